"""A program that grades answers, one JSON line at a time, and ends itself when one takes too long.

In: `{"scorer": name, "case": what that scorer needs}`. Out: first the verdict that holds if this process ends
over the answer, then, stage by stage, the verdict that holds from then on, and `{"settled": true}` after the last.

It is started by `grader.Grader` as a process of its own, without torch: a computer algebra system asked for
9^(9^9), or a fraction of 1e9999999999, cannot be stopped from within, so a watchdog of the C level ends the
process. Each stage has the limit; loading a scorer has none, since that is no answer's time.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from typing import Any, Protocol, TextIO, cast

from moe_bias.tasks.verdict import Verdict

SCORERS = {
    "mathematics": "moe_bias.tasks.equality",
    "procedural": "moe_bias.tasks.reading",
    "general_points": "moe_bias.tasks.general_points",
}
"""The module of each scorer, imported when it is first asked for."""


class Scorer(Protocol):
    """What such a module offers."""

    def load(self, case: Mapping[str, Any]) -> None:
        """Loads what the first case of its kind needs."""

    def verdicts(self, case: Mapping[str, Any]) -> Iterator[Verdict]:
        """At once what holds if the next stage ends this process, then so after each stage; last the verdict."""


def main() -> None:
    """Grades what standard input asks until it ends; the argument is the limit in seconds."""
    logging.disable()  # math-verify warns that its own limit is off; the watchdog is the limit here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, whose end closes the input
    limit, messages = float(sys.argv[1]), sys.stdout
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # some scorers print
        _say({"ready": True}, messages)
        for line in sys.stdin:
            request = json.loads(line)
            scorer = cast(Scorer, import_module(SCORERS[request["scorer"]]))
            scorer.load(request["case"])
            stages = scorer.verdicts(request["case"])
            while (verdict := _next(stages, limit, nowhere)) is not None:
                _say(asdict(verdict), messages)
            _say({"settled": True}, messages)


def _say(message: Mapping[str, Any], messages: TextIO) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


def _next(stages: Iterator[Verdict], limit: float, nowhere: TextIO) -> Verdict | None:
    """The next verdict; the watchdog never watches while one is handed on."""
    with _within(limit, nowhere):
        return next(stages, None)


@contextmanager
def _within(seconds: float, nowhere: TextIO) -> Iterator[None]:
    """Ends this process where the block takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
