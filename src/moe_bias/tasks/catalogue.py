"""Tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moe_bias.config import UserError
from moe_bias.tasks.general_points import GeneralPoints
from moe_bias.tasks.procedural import ProceduralTask
from moe_bias.tasks.task import Task


def make_task(name: str, options: Mapping[str, Any], small: bool = False) -> Task:
    """The task "general_points", or one of reasoning-gym; `small` sizes it for models of 135M parameters.

    Given options win over the small ones. Raises UserError on options that the task lacks; a name that
    reasoning-gym lacks is refused when problems are drawn.
    """
    if name == GeneralPoints.name:
        return _general_points(options, small)
    return ProceduralTask.sized_for_small_models(name, options) if small else ProceduralTask(name, options)


def _general_points(options: Mapping[str, Any], small: bool) -> GeneralPoints:
    known = [option.name for option in fields(GeneralPoints)]
    for option in options:
        if option not in known:
            raise UserError(f"task {GeneralPoints.name} has no option {option!r}; its options are {', '.join(known)}")
    return GeneralPoints(**{**(GeneralPoints.SMALL if small else {}), **options})
