"""Tasks by name: those that are built in, those of users, and what there is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_bias.plugins import installed, is_brought, label, resolve
from moe_bias.tasks.general_points import GeneralPoints
from moe_bias.tasks.options import Option, fitted, options_of
from moe_bias.tasks.own import own_task
from moe_bias.tasks.procedural import REFUSED, SMALL_OPTIONS, ProceduralTask, data_sets
from moe_bias.tasks.reading import NOT_OPTIONS
from moe_bias.tasks.task import TASKS, Task

_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
"""In a docstring that is Markdown."""


@dataclass(frozen=True)
class KnownTask:
    """A task that there is: its name, who has it, what it is about, and why it is refused ("" where it is not)."""

    name: str
    source: str
    about: str
    refused: str = ""


def make_task(given: str | Task | Callable[..., Task], options: Mapping[str, Any], small: bool = False) -> Task:
    """The task "general_points", one of a user's, or one of reasoning-gym.

    A user's is an object, or a class or function that makes one of the options: itself, as `module:name`, or by the
    name of an entry point of the group `moe_bias.tasks`. `small` sizes the others for models of 135M parameters;
    given options win over the small ones. Raises UserError on options that the task lacks or that are of
    another type, and where a user's task cannot be had; names and options that reasoning-gym lacks are refused when
    problems are drawn.
    """
    if given == GeneralPoints.name:
        return _general_points(options, small)
    if not isinstance(given, str) or is_brought(TASKS, given):
        return own_task(resolve(TASKS, given), options, label(given))
    return ProceduralTask.sized_for_small_models(given, options) if small else ProceduralTask(given, options)


def known_tasks() -> Iterator[KnownTask]:
    """Every task that has a name. Raises UserError where reasoning-gym is not installed, after the others."""
    yield KnownTask(GeneralPoints.name, "built in", "A target from the numbers of a few cards")
    for name, points in sorted(installed(TASKS).items()):
        for point in points:
            yield KnownTask(name, point.dist.name if point.dist else "installed package", point.value)
    for name, (data_set, _) in sorted(data_sets("the list of reasoning-gym's tasks").items()):
        about = _first_sentence(data_set) or _subject(data_set)
        yield KnownTask(name, "reasoning-gym", about, REFUSED.get(name, ""))


def task_options(name: str) -> tuple[dict[str, Option], Mapping[str, Any]]:
    """The options of a task, and those of them that `small` sets.

    Raises UserError where there is no such task.
    """
    if name == GeneralPoints.name:
        return options_of(GeneralPoints), GeneralPoints.SMALL
    if is_brought(TASKS, name):
        found = resolve(TASKS, name)
        return (options_of(found) if inspect.isroutine(found) or inspect.isclass(found) else {}), {}
    ProceduralTask(name).problems(1, 0)
    return options_of(data_sets(name)[name][1], NOT_OPTIONS), SMALL_OPTIONS.get(name, {})


def _general_points(options: Mapping[str, Any], small: bool) -> GeneralPoints:
    given = fitted(GeneralPoints.name, GeneralPoints, options)
    return GeneralPoints(**{**(GeneralPoints.SMALL if small else {}), **given})


def _first_sentence(kind: type[Any]) -> str:
    """Of a docstring; a dataclass without one has its signature there."""
    lines = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    if lines.startswith(f"{kind.__name__}("):
        return ""
    sentence = _LINK.sub(r"\1", lines.split(". ")[0].split("; ")[0]).removesuffix(".").removeprefix("Generates ")
    return sentence[:1].upper() + sentence[1:]


def _subject(data_set: type[Any]) -> str:
    """reasoning-gym's own for the task, such as geometry."""
    return data_set.__module__.split(".")[-2].capitalize()
