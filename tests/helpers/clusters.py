"""Ray clusters of several nodes on this machine, what is done to them, and bytes that go through them."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_CALM = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}
"""No processes that nobody needs; and none killed because others fill the machine's memory."""
_STARTS = 4
"""A node gives up where its own agents have not started within seconds, as on a busy machine."""
_QUIET = {"include_dashboard": False, "object_store_memory": 2**27}


class Machines:
    """Nodes of one Ray cluster; the first has no room for workers, so that any other may be killed."""

    def __init__(self) -> None:
        for name, value in _CALM.items():
            os.environ.setdefault(name, value)
        self._cluster = _patiently(self._head)

    def _head(self) -> Any:
        from ray.cluster_utils import Cluster

        return Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **_QUIET})

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, cores: int, **variables: str) -> Any:
        """A node, whose processes have these variables."""
        sizes = {"num_cpus": cores, "object_store_memory": 2**27, "env_vars": variables}
        return _patiently(lambda: self._cluster.add_node(**sizes))

    def kill(self, node: Any) -> None:
        """At once, with its workers."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


def _patiently(start: Callable[[], Any]) -> Any:
    for left in reversed(range(_STARTS)):
        try:
            return start()
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise


def pids_of(kind: str) -> list[int]:
    """Of the living workers of this kind that this process, or one of its own, has started."""
    found, parents = [], {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if (entry / "cmdline").read_bytes().startswith(f"ray::{kind}".encode()):
                    found.append(int(entry.name))
    return sorted(pid for pid in found if _is_below(pid, os.getpid(), parents))


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


def kill_one(kind: str, seconds: float = 60.0) -> None:
    """Kills a worker of this kind, as a system out of memory does; waits for one."""
    end = time.monotonic() + seconds
    while not (found := pids_of(kind)):
        assert time.monotonic() < end, f"no worker of {kind} has come up"
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)


class Carried:
    """Bytes that this process gave to Ray and got from it, and the most of either at once."""

    def __init__(self) -> None:
        self.sent = self.received = self.most_sent = self.most_received = 0


@contextmanager
def counted_bytes(monkeypatch: Any) -> Iterator[Carried]:
    """Counts within Ray itself all that this process sends or stores, and all that it gets."""
    from ray._private.serialization import SerializationContext

    carried = Carried()
    serialize, deserialize = SerializationContext.serialize, SerializationContext.deserialize_objects

    def sending(self: Any, value: Any, *more: Any) -> Any:
        found = serialize(self, value, *more)
        carried.sent += found.total_bytes
        carried.most_sent = max(carried.most_sent, found.total_bytes)
        return found

    def getting(self: Any, pairs: Any, *more: Any) -> Any:
        for pair in pairs:
            size = 0 if pair[0] is None else len(pair[0])
            carried.received += size
            carried.most_received = max(carried.most_received, size)
        return deserialize(self, pairs, *more)

    with monkeypatch.context() as patch:
        patch.setattr(SerializationContext, "serialize", sending)
        patch.setattr(SerializationContext, "deserialize_objects", getting)
        yield carried
