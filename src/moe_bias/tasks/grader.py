"""Answers graded in processes of their own, each under a time limit.

Scorers that others wrote, a computer algebra system among them, can hang on an answer or take the process with
them. The processes (`grading_worker`) speak JSON over pipes, know nothing of torch or of the program that
started them, are kept for the next answers, and are started anew when one has ended itself over an answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import LifoQueue
from typing import Any

from moe_bias.tasks.verdict import Verdict

Case = Mapping[str, Any]
"""What a scorer needs to know of one answer, as JSON can say it."""
MOST_WORKERS = 4
_WORTH_A_PROCESS = 16
"""Answers; reasoning-gym takes seconds to load in another process, and a millisecond to grade most of them."""
_STARTS = 3
"""A process that ends before it has looked at the case, as one that was killed, is started anew so often."""


@cache
def shared_grader() -> Grader:
    """The grader of all tasks of this program, whose processes are kept until it ends."""
    return Grader()


class Grader:
    """A pool of grading processes, started as they are needed; `limit` is in seconds for each stage of an answer."""

    def __init__(self, limit: float = 5.0, workers: int | None = None) -> None:
        count = workers or min(MOST_WORKERS, os.cpu_count() or 1)
        self._workers = [_Worker(limit) for _ in range(count)]
        self._idle: LifoQueue[_Worker] = LifoQueue()  # one that has started and loaded is taken first
        for worker in self._workers:
            self._idle.put(worker)

    def grade(self, scorer: str, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict by one of `grading_worker.SCORERS` for each case, in order."""
        count = min(len(self._workers), -(-len(cases) // _WORTH_A_PROCESS)) or 1
        with ThreadPoolExecutor(count) as threads:  # each waits for a process
            return list(threads.map(lambda case: self._grade_one(scorer, case), cases))

    def __reduce__(self) -> tuple[Any, ...]:
        """In another program, whatever is sent there grades by the grader of that one."""
        return shared_grader, ()

    def close(self) -> None:
        """Ends the processes; the next answers start new ones."""
        for worker in self._workers:
            worker.stop()

    def _grade_one(self, scorer: str, case: Case) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.grade(scorer, case)
        finally:
            self._idle.put(worker)


class _Worker:
    """One grading process."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._process: subprocess.Popen[str] | None = None

    def grade(self, scorer: str, case: Case) -> Verdict:
        """The last verdict that the process gave, after which a process that ended over the case is gone."""
        request = json.dumps({"scorer": scorer, "case": case}) + "\n"
        for _ in range(_STARTS):
            verdict = self._asked(request)
            if verdict is not None:
                return verdict
        raise RuntimeError("the grading process ended before it looked at an answer; its error is above")

    def _asked(self, request: str) -> Verdict | None:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return None
        last = None
        for message in _messages(process):
            if message.get("settled"):
                return last
            last = Verdict(**message)
        self.stop()
        return last

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = _start(self._limit)
            self._stop_at_the_end = weakref.finalize(self, _stop, self._process)
        return self._process

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._stop_at_the_end()
            self._process = None


def _start(limit: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "moe_bias.tasks.grading_worker", str(limit)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if next(_messages(process), None) is None:
        raise RuntimeError(f"the grading process ended at once with exit code {process.wait()}; its error is above")
    return process


def _messages(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the process says until it ends."""
    assert process.stdout is not None
    while (line := process.stdout.readline()).endswith("\n"):
        yield json.loads(line)


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
