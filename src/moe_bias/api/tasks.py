"""Tasks by name, with their options as keywords."""

from __future__ import annotations

from typing import Any

from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.procedural import ProceduralTask
from moe_bias.tasks.task import Task


def task(name: str, *, easy: bool = True, **options: Any) -> Task:
    """A task by its name: 'general_points', one of reasoning-gym, `module:name`, or one of an installed package.

    `moe-bias tasks` lists them and their options. `easy` sizes a task for models of 135M parameters where the
    options do not. Raises UserError where there is no such task, option or value.
    """
    made = make_task(name, options, easy)
    if isinstance(made, ProceduralTask):
        made.problems(1, 0)  # it looks at its name and options when it draws
    return made
