"""`moe-bias tasks`: what there is to train on and to measure by, and what one of it is like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_bias.commands.looking_settings import TasksSettings
from moe_bias.mistakes import UserError, shown
from moe_bias.progress import text_console
from moe_bias.tasks.catalogue import KnownTask, known_tasks, make_task, task_options
from moe_bias.tasks.options import REQUIRED, Option

WIDTH = 100
YOUR_OWN = "A task of your own is given as module:name: docs/guides/tasks.md."


def run(settings: TasksSettings) -> None:
    """Prints the list, or one task. Raises UserError on a name that no task has, and on a task that is refused."""
    console = text_console()
    console.width = min(console.width, WIDTH)
    if settings.name:
        _show(settings.name, console)
    else:
        _list(settings.refused, console)


def _list(refused: bool, console: Console) -> None:
    """Where reasoning-gym is missing, what there is without it, and then how to have it."""
    found, missing = [], ""
    try:
        for task in known_tasks():
            found.append(task)
    except UserError as error:
        missing = str(error)
    chosen = [task for task in found if bool(task.refused) == refused]
    console.print(_table(chosen, "why it is refused" if refused else "what it asks"))
    if missing:
        console.print(f"{missing[0].upper()}{missing[1:]}", highlight=False)
    elif not refused:
        others = len(found) - len(chosen)
        console.print(f"{others} more of reasoning-gym cannot serve as a reward: moe-bias tasks --refused")
    console.print(f"Options and a problem of one: moe-bias tasks NAME. {YOUR_OWN}")


def _table(tasks: Iterable[KnownTask], about: str) -> Table:
    table = Table("task", "of", about, box=box.SIMPLE_HEAD)
    for task in tasks:
        table.add_row(*map(Text, (task.name, task.source, task.refused or task.about)))
    return table


def _show(name: str, console: Console) -> None:
    options, small = task_options(name)
    if options:
        console.print(_options_table(options, small))
    else:
        console.print(f"Task {name} has no options.", highlight=False)
    needed = [option for option, found in options.items() if found.default is REQUIRED]
    if needed:
        console.print(f"It has to be given {', '.join(needed)}, so no problem of it can be shown.", highlight=False)
        return
    (problem,) = make_task(name, {}, small=True).problems(1, 0)
    easy = " (with --easy)" if small else ""
    for title, text in ((f"A problem{easy}:", problem.question), ("Its gold answer:", problem.gold)):
        console.print(title, highlight=False)
        console.print(Padding(Text(text), (0, 0, 1, 2)))


def _options_table(options: Mapping[str, Option], small: Mapping[str, Any]) -> Table:
    table = Table("option", "type", "default", *(["with --easy"] if small else []), box=box.SIMPLE_HEAD)
    for name, option in options.items():
        default = "has to be given" if option.default is REQUIRED else shown(option.default)
        easy = [shown(small[name]) if name in small else ""] if small else []
        table.add_row(*map(Text, (name, option.type_name, default, *easy)))
    return table
