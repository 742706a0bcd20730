"""What goes to the terminal: text as it is, and progress bars with a rate and an expected end on standard error.

Other libraries draw bars of their own over work of a second or two; `without_bars_of_others` keeps them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

_DRAWN = ContextVar("_DRAWN", default=True)
"""Whether meters are drawn."""


def text_console(**options: Any) -> Console:
    """A console that prints every text as it is: what models and data write may look like rich's markup."""
    return Console(markup=False, emoji=False, **options)


def say(console: Console, sentence: str) -> None:
    """Prints a sentence as it is, on one line."""
    console.print(sentence, highlight=False, soft_wrap=True)


class RateColumn(ProgressColumn):
    """How many units a second."""

    def render(self, task: Task) -> Text:
        """The mean speed so far, or a dash before there is one."""
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text("-" if speed is None else f"{speed:,.0f} {unit}/s", style="progress.data.speed")


@dataclass
class Meter:
    """A running bar: `advance` moves it, `note` shows a few words beside it."""

    progress: Progress
    task: TaskID

    def advance(self, units: float) -> None:
        """Adds units of work done."""
        self.progress.advance(self.task, units)

    def note(self, text: str) -> None:
        """Replaces the words beside the bar."""
        self.progress.update(self.task, note=text)

    def say(self, sentence: str) -> None:
        """Prints a line that stays, above the bar."""
        self.progress.console.print(sentence, highlight=False, soft_wrap=True)


@contextmanager
def without_bars_of_others() -> Iterator[None]:
    """While open, transformers draws no bars over reading, converting and writing weights; downloads show theirs.

    They are drawn all the same where transformers is told to say more, as by `TRANSFORMERS_VERBOSITY=info`.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_files
    from transformers.utils import logging

    if logging.get_verbosity() <= logging.INFO:
        yield
        return
    before, tqdm = logging.set_tqdm_hook(lambda _, args, options: logging.EmptyTqdm(*args, **options)), gguf_files.tqdm
    gguf_files.tqdm = logging.tqdm  # it has tqdm's own otherwise, which listens to no hook
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
        gguf_files.tqdm = tqdm


@contextmanager
def without_bars() -> Iterator[None]:
    """While open, no meter of ours is drawn: for many short pieces of work under one bar of their own."""
    token = _DRAWN.set(False)
    try:
        yield
    finally:
        _DRAWN.reset(token)


@contextmanager
def meter(description: str, total: float, unit: str, visible: bool = True) -> Iterator[Meter]:
    """A bar over `total` units of work, drawn while the block runs, or not at all.

    It stays on one line: where the terminal is narrow, the bar itself gives way first.
    """
    columns = (
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        RateColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=text_console(stderr=True), disable=not (visible and _DRAWN.get())) as progress:
        yield Meter(progress, progress.add_task(description, total=total, unit=unit, note=""))
