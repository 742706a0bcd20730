"""A Ray cluster that is there already, or one on this machine alone; and whether its nodes can do the work."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bias.config import Cluster
from moe_bias.extras import need
from moe_bias.features.build import versions
from moe_bias.mistakes import UserError, reason_of

_STORE_BYTES = 2**28
"""Of a cluster's object store on this machine: nothing large goes through it."""
_SECONDS = 10.0
"""In which a cluster must answer."""
_STARTS = 3
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",
}
"""Nothing is reported to anyone, workers are no less urgent than the command itself, and where that was started by
`uv run` they have its environment as it is: Ray would have uv look at it anew for each of them.
"""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or one of several nodes on one, with what it has in all."""

    id: str
    name: str
    cores: float
    gpus: float

    def workers(self, cluster: Cluster, on_gpus: bool) -> int:
        """How many there is room for."""
        by_cores = int(self.cores) // cluster.worker_cores
        return min(int(self.gpus), by_cores) if on_gpus else by_cores


def refuse_unusable(cluster: Cluster) -> None:
    """Raises UserError, before anything is loaded, where Ray is not installed or nothing answers at the address."""
    if not cluster.is_this_process:
        need("ray", "`workers` and `ray`", ", or leave them out")
        with _answering(cluster.ray):
            _refuse_unanswered(cluster.ray)


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Ray, while the block runs: a cluster at an address, else one on this machine that ends with the block.

    A connection that the program has already is used, and left. Raises UserError where Ray is not installed and where
    no cluster answers.
    """
    need("ray", "`workers` and `ray`", ", or leave them out")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    if cluster.ray:
        _join(cluster.ray)
    else:
        _start(max(_local_workers(cluster) * cluster.worker_cores, os.cpu_count() or 1))
    try:
        yield
    finally:
        ray.shutdown()


def _start(cores: int) -> None:
    """Ray gives up where its own agents have not started within seconds, as on a busy machine; so again."""
    import ray

    for left in reversed(range(_STARTS)):
        try:
            ray.init("local", num_cpus=cores, object_store_memory=_STORE_BYTES, **_silent(), include_dashboard=False)
            return
        except Exception as error:  # Ray raises no narrower one
            ray.shutdown()
            if not left:
                raise UserError(
                    f"Ray does not start on this machine ({reason_of(error)}); try it when it is less busy"
                ) from error


def _local_workers(cluster: Cluster) -> int:
    """Asked for by number, they may be more than there are cores."""
    return cluster.workers if isinstance(cluster.workers, int) else 1


def _silent() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": "CRITICAL", "configure_logging": True}


def _join(address: str) -> None:
    import ray

    with _answering(address):
        _refuse_unanswered(address)
        ray.init(address, **_silent())


@contextmanager
def _answering(address: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers at `ray` {address!r} ({reason_of(error)}); start Ray there, or leave `ray` out "
            "for a cluster on this machine alone"
        ) from error


def _refuse_unanswered(address: str) -> None:
    """Ray would wait for minutes. Raises OSError, or ValueError on what is no address."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("", "auto"):
        return
    if not (host and colon and port.isdecimal()):
        raise ValueError("an address is auto, host:port or ray://host:port")
    with socket.create_connection((host, int(port)), timeout=_SECONDS):
        pass


def nodes() -> list[Node]:
    """Those that are alive and can have a worker."""
    import ray

    found = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("CPU", 0) >= 1:
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"
            found.append(Node(node["NodeID"], name, has["CPU"], has.get("GPU", 0)))
    return found


def workers_on(there: Sequence[Node], cluster: Cluster, on_gpus: bool) -> int:
    """How many workers to have on these nodes; 0 where 'auto' finds no room.

    Raises UserError where a number was given and there is no room for it.
    """
    room = sum(node.workers(cluster, on_gpus) for node in there)
    if cluster.workers == "auto" or cluster.workers <= room:
        return room if cluster.workers == "auto" else cluster.workers
    cores, gpus = sum(node.cores for node in there), sum(node.gpus for node in there)
    of_one = f"{cluster.worker_cores} cores and a GPU each" if on_gpus else f"{cluster.worker_cores} cores each"
    raise UserError(
        f"`workers` {cluster.workers} of {of_one} are more than the {len(there)} nodes of the cluster have room for "
        f"({cores:g} cores, {gpus:g} GPUs in all), which is {room}"
    )


def uses_gpus(there: Sequence[Node], device: str) -> bool:
    """Whether workers take a GPU each: where one was asked for, and on 'auto' where there are any."""
    return device not in ("auto", "cpu") or (device == "auto" and any(node.gpus for node in there))


def fit(there: Sequence[Node], folder: Path | None) -> list[Node]:
    """The nodes, without those that have left meanwhile, that are found to do.

    Raises UserError, naming the node, on other versions than here, and where a node does not see the folder. That is
    tried: a file is written here, and looked for there.
    """
    if folder is None:
        return _fit(there, None, "")
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder.absolute() / f".seen-{uuid.uuid4().hex}"
    try:
        mark.write_text(mark.name)
        return _fit(there, mark, str(folder))
    finally:
        mark.unlink(missing_ok=True)


def _fit(there: Sequence[Node], mark: Path | None, folder: str) -> list[Node]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ours, look, found = versions(), ray.remote(_looking()), list[Node]()
    asked = {
        look.options(
            num_cpus=0, max_retries=3, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(list(ours), None if mark is None else str(mark)): node
        for node in there
    }
    for answer, node in asked.items():
        try:
            theirs, sees = ray.get(answer)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError:  # it has left meanwhile
            continue
        for name, version in ours.items():
            if theirs[name] != version:
                raise UserError(
                    f"node {node.name} has {theirs[name] or 'no'} {name}, here it is {version}; install the same on "
                    "all nodes, or start Ray on those alone that have it"
                )
        if not sees:
            raise UserError(
                f"node {node.name} does not see {folder!r}: what was written there from here is not there; give a "
                "folder that all nodes share"
            )
        found.append(node)
    return found


def _looking() -> Callable[[list[str], str | None], tuple[dict[str, str], bool]]:
    """A function that Ray sends as it is: it imports nothing of this package, whose version is to be found out."""

    def look(packages: list[str], mark: str | None) -> tuple[dict[str, str], bool]:
        import os
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for name in packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = ""
        return found, mark is None or os.path.isfile(mark)

    return look
