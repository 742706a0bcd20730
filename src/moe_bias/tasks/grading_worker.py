"""A program that grades mathematical answers, one JSON line at a time, and ends itself when one takes too long.

In: `{"gold": text, "completion": text}`. Out, as soon as each is known: `{"gold": readable?}`, then
`{"answer": text or null, "readable": ...}`, then `{"correct": ...}`, until one settles the matter. An
end before the line that settles it says which stage was too much.

It is started by `grader.Grader` as a process of its own, without torch: a computer algebra system
asked for 9^(9^9) cannot be stopped from within, so a watchdog of the C level ends the process. Reading
the gold answer has one limit, the completion another.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TextIO

from math_verify import parse, verify

Message = dict[str, Any]


def main() -> None:
    """Grades what standard input asks until it ends; the argument is the limit in seconds."""
    logging.disable()  # math-verify warns that its own limit is off; the watchdog is the limit here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, whose end closes the input
    limit = float(sys.argv[1])
    with open(os.devnull, "w") as nowhere:
        verify(parse("1/2", parsing_timeout=None), parse("$0.5$", parsing_timeout=None), timeout_seconds=None)
        _say({"ready": True})  # and what is loaded at the first use is no answer's time
        for line in sys.stdin:
            for message in _stages(json.loads(line), limit, nowhere):
                _say(message)


def _say(message: Message) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _stages(request: dict[str, str], limit: float, nowhere: TextIO) -> Iterator[Message]:
    """The stages of one grading; the watchdog never watches while a message is handed on."""
    with _within(limit, nowhere):
        gold = read_gold(request["gold"])
    yield {"gold": bool(gold)}
    if not gold:
        return
    started = time.monotonic()
    with _within(limit, nowhere):
        answer = parse(request["completion"], parsing_timeout=None)
    is_readable = any(not isinstance(part, str) for part in answer)
    yield {"answer": next((part for part in answer if isinstance(part, str)), None), "readable": is_readable}
    if is_readable:
        with _within(max(limit - (time.monotonic() - started), 0.01), nowhere):
            is_correct = verify(list(gold), answer, timeout_seconds=None)
        yield {"correct": bool(is_correct)}


@contextmanager
def _within(seconds: float, nowhere: TextIO) -> Iterator[None]:
    """Ends this process where the block takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> tuple[Any, ...]:
    """What math-verify makes of a gold answer, LaTeX or plain; empty where that is no expression."""
    read = parse(f"\\boxed{{{gold}}}", parsing_timeout=None) if gold.strip() else []
    return tuple(read) if any(not isinstance(part, str) for part in read) else ()


if __name__ == "__main__":
    main()
