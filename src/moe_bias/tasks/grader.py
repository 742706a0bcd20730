"""Mathematical answers graded by math-verify in processes of their own, each under a time limit.

The processes speak JSON over pipes (`grading_worker`), know nothing of torch or of the program that
started them, and are started anew when one has ended itself over an answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from moe_bias.tasks.verdict import Verdict, failed, judged

Pair = tuple[str, str]
MOST_WORKERS = 4


class Grader:
    """A pool of grading processes, started with the first answers; `limit` is in seconds for each answer."""

    def __init__(self, limit: float = 5.0, workers: int | None = None) -> None:
        count = workers or min(MOST_WORKERS, os.cpu_count() or 1)
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = [_Worker(limit) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict for each (gold answer, completion), in order."""
        with ThreadPoolExecutor(len(self._workers)) as threads:  # each waits for a process
            return list(threads.map(self._grade_one, pairs))

    def close(self) -> None:
        """Ends the processes; the next answers start new ones."""
        for worker in self._workers:
            worker.stop()

    def _grade_one(self, pair: Pair) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.grade(*pair)
        finally:
            self._idle.put(worker)


class _Worker:
    """One grading process."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._process: subprocess.Popen[str] | None = None

    def grade(self, gold: str, completion: str) -> Verdict:
        """The verdict, after which a process that ended over it is gone."""
        process = self._running()
        request = json.dumps({"gold": gold, "completion": completion})
        assert process.stdin is not None
        process.stdin.write(request + "\n")
        process.stdin.flush()
        return self._verdict(process)

    def _verdict(self, process: subprocess.Popen[str]) -> Verdict:
        gold = _listen(process)
        if gold is None or not gold["gold"]:
            return self._after(gold, failed("bad gold"))
        read = _listen(process)
        if read is None:
            return self._after(read, failed("timed out"))
        if not read["readable"]:
            return failed("unparseable", read["answer"])
        compared = _listen(process)
        if compared is None:
            return self._after(compared, failed("timed out", read["answer"]))
        return judged(compared["correct"], read["answer"])

    def _after(self, last: dict[str, Any] | None, verdict: Verdict) -> Verdict:
        if last is None:  # the process has ended
            self.stop()
        return verdict

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
    if _listen(process) is None:  # its time to import is no answer's
        raise RuntimeError(f"the grading process ended at once with exit code {process.wait()}; its error is above")
    return process


def _listen(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """The next message, or None from a process that has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else None


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
