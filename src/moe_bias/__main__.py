"""The program: from its first moment on an interrupt ends it with 130 and a sentence."""

from __future__ import annotations

import os
import signal
import sys

from moe_bias.interrupts import interrupt_between_imports

INTERRUPTED = 130


def main() -> int:
    """Runs the command line; returns its exit code, unless it was interrupted."""
    try:
        interrupt_between_imports()
        from moe_bias.cli import main as run

        code = run()
    except KeyboardInterrupt:  # while the above was imported, or between two lines of ours
        sys.stderr.write("moe-bias: interrupted: nothing was saved\n")
        code = INTERRUPTED
    if code == INTERRUPTED:
        _leave()
    return code


def _leave() -> None:
    """Ends the process at once: threads that have not heard of the interrupt would go on, and complain when they end.

    Whatever had to be closed was, on the way here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
