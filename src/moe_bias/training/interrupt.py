"""Ctrl-C between two steps instead of within one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; a second press interrupts at once.

    An optimiser step that is cut in two leaves weights and moments that do not belong together. Where
    the program handles interrupts its own way, or not at all, that is left as it is.
    """
    pressed = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if not _python_handles_interrupts():
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _python_handles_interrupts() -> bool:
    from threading import current_thread, main_thread

    return current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
