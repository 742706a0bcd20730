"""The server's end of the process that learns: asks it, hears its replies, and starts another where it has ended."""

from __future__ import annotations

import logging
import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Lock, Thread
from typing import Any, Protocol

from moe_bias.learning.process import learn

ENOUGH_FAILURES = 5
"""Times in a row that the process may end without an answer before it is given up."""
_log = logging.getLogger(__name__)
Request = tuple[str, str]
"""What is asked for, and the adapter's name."""


class Listener(Protocol):
    """Who is told, on the worker's thread."""

    def replied(self, request: Request, found: Any, failure: str | None) -> None:
        """The process answered."""

    def restarted(self) -> None:
        """Another process has taken the place of one that ended, and knows of nothing yet."""

    def given_up(self, reason: str) -> None:
        """The process has ended too often."""


class Worker:
    """One process at a time, until `close`."""

    def __init__(self, arguments: tuple[Any, ...], listener: Listener) -> None:
        """`arguments` are those of `learn` before its pipes."""
        self._arguments, self._listener = arguments, listener
        self._context = multiprocessing.get_context("spawn")
        self._asking, self._asked = Lock(), set[Request]()
        self._is_closing = False
        self._process, self._requests, self._replies = self._start()
        self._thread = Thread(target=self._read, name="moe-bias learning", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process that is there now."""
        return self._process.pid

    def ask(self, kind: str, name: str) -> None:
        """Sends a request that is not on its way already."""
        with self._asking:
            if (kind, name) in self._asked:
                return
            self._asked.add((kind, name))
            with suppress(OSError):  # the process is gone, and the next one is told of all adapters
                self._requests.send((kind, name))

    def close(self) -> None:
        """Waits for the process to write down what it holds."""
        self._is_closing = True
        with self._asking:
            self._requests.close()
        self._thread.join()
        self._process.join()

    def _start(self) -> tuple[BaseProcess, Connection, Connection]:
        requests_in, requests_out = self._context.Pipe(duplex=False)
        replies_in, replies_out = self._context.Pipe(duplex=False)
        process = self._context.Process(target=learn, args=(*self._arguments, requests_in, replies_out), daemon=True)
        process.start()
        requests_in.close()
        replies_out.close()
        return process, requests_out, replies_in

    def _read(self) -> None:
        failures = 0
        while True:
            try:
                request, found, failure = self._replies.recv()
            except (EOFError, OSError):
                failures += 1
                if self._is_closing or not self._begin_again(failures):
                    return
            else:
                failures = 0
                with self._asking:
                    self._asked.discard(request)
                self._listener.replied(request, found, failure)

    def _begin_again(self, failures: int) -> bool:
        self._process.join()
        code = self._process.exitcode
        if failures > ENOUGH_FAILURES:
            self._listener.given_up(f"the process that learns ended {failures} times in a row, at last with {code}")
            return False
        _log.warning("the process that learns ended with %s; another one goes on", code)
        with self._asking:
            self._asked.clear()
            self._process, self._requests, self._replies = self._start()
        self._listener.restarted()
        return True
