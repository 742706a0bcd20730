"""`moe-bias serve` on vLLM, as processes of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

BASE = "tiny"
PATIENCE = 300
"""Seconds that a start may take; several processes import vLLM."""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Server:
    """A server whose processes are a session of their own, so that all of them can be ended."""

    model: Path
    adapters: Path
    log: Path
    more: tuple[object, ...] = ()
    port: int = field(default_factory=_free_port)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        words = ["serve", "--model", self.model, "--adapters", self.adapters, "--served-name", BASE, *self.more]
        words += ["--port", self.port, "--dtype", "float32", "--cache-memory", "64MiB"]
        words += ["--", "--enforce-eager", "--max-model-len", 256, "--distributed-executor-backend", "uni"]
        words += ["--chat-template", "{{ messages[0].content }}"]
        command: list[str] = [
            sys.executable,
            "-c",
            "from moe_bias.cli import main; raise SystemExit(main())",
            *map(str, words),
        ]
        with self.log.open("w") as log:
            self._started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        ends = time.monotonic() + PATIENCE
        while not self._is_up():
            assert self._started[-1].poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < ends, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def _is_up(self) -> bool:
        try:
            return urlopen(f"http://127.0.0.1:{self.port}/health").status == 200
        except URLError:
            return False

    @property
    def process(self) -> int:
        """The number of the one that was started last, which takes the requests."""
        return self._started[-1].pid

    def end(self, number: int) -> int:
        """The exit code after a signal to the process that was started."""
        self._started[-1].send_signal(number)
        return self._started[-1].wait(PATIENCE)

    def remove(self) -> None:
        """Whatever is left: vLLM's engine outlives a server that is killed."""
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)

    @property
    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)


@contextmanager
def started(server: Server) -> Iterator[Server]:
    """The server while the block runs, of which nothing is left after it."""
    try:
        server.start()
        yield server
    finally:
        server.remove()
