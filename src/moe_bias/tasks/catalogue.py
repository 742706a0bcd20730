"""Tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_bias.tasks.general_points import GeneralPoints
from moe_bias.tasks.options import fitted
from moe_bias.tasks.procedural import ProceduralTask
from moe_bias.tasks.task import Task


def make_task(name: str, options: Mapping[str, Any], small: bool = False) -> Task:
    """The task "general_points", or one of reasoning-gym; `small` sizes it for models of 135M parameters.

    Given options win over the small ones. Raises UserError on options that the game lacks or that are of
    another type; names and options that reasoning-gym lacks are refused when problems are drawn.
    """
    if name == GeneralPoints.name:
        return _general_points(options, small)
    return ProceduralTask.sized_for_small_models(name, options) if small else ProceduralTask(name, options)


def _general_points(options: Mapping[str, Any], small: bool) -> GeneralPoints:
    given = fitted(GeneralPoints.name, GeneralPoints, options)
    return GeneralPoints(**{**(GeneralPoints.SMALL if small else {}), **given})
