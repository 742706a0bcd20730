"""When Ctrl-C interrupts: not within an import, and not within a step."""

from __future__ import annotations

import _thread
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import FrameType

_AGAIN = 0.05
"""Seconds until it is looked again whether an import has ended."""


def interrupt_between_imports() -> None:
    """From now on an interrupt in the middle of an import is raised once the import has ended.

    To be called by a program, in its main thread. An import that is cut in two may end the process (an exception has
    no way out of an extension that is being loaded) or come out as an error that says nothing of an interrupt
    (modules that load themselves when first used, as NumPy's, are left half made). Where Python does not
    handle interrupts its own way, that is left as it is.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _unless_importing)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; a second press interrupts at once.

    An optimiser step that is cut in two leaves weights and moments that do not belong together. Where
    something else handles interrupts its own way, or not at all, that is left as it is.
    """
    pressed = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before not in (signal.default_int_handler, _unless_importing):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _unless_importing(signum: int, frame: FrameType | None) -> None:
    if not _is_importing(frame):
        raise KeyboardInterrupt
    later = Timer(_AGAIN, _thread.interrupt_main)
    later.daemon = True
    later.start()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
