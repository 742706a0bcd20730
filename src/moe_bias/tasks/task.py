"""What a task is: problems drawn by a seed, and verdicts on completions.

A problem's question is the whole text of the user's turn, with the wanted form of the answer in it:
`conversations.ask(problem.question)` puts it to a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_bias.mistakes import UserError, shown
from moe_bias.plugins import Kind
from moe_bias.tasks.verdict import Verdict

Entry = Mapping[str, Any]
TASKS = Kind("task")
"""Tasks of users; `catalogue.make_task` knows those that are built in."""


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer, a worked answer to learn from ("" where there is none), and what its task needs."""

    question: str
    gold: str
    worked: str = ""
    entry: Entry = field(default_factory=dict, repr=False, compare=False)


class Task(Protocol):
    """Problems and their verifier."""

    @property
    def name(self) -> str:
        """What the task is called in records."""

    def problems(self, count: int, seed: int) -> list[Problem]:
        """`count` problems, no question twice, the same ones for the same seed.

        Raises UserError where there are too few different problems.
        """

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """One verdict for each completion, which answers the problem at its place."""


def too_few(task: str, found: int, wanted: int, way_out: str = "") -> UserError:
    """The error of a task that has fewer different problems than were asked for."""
    return UserError(f"task {task} gives only {found} different problems, {wanted} were asked for{way_out}")


def of_bad_golds(names: Sequence[str], total: int) -> str:
    """The sentence on the problems, of so many, whose gold answers cannot be read."""
    return (
        f"{len(names)} of {total} problems have a gold answer that the grader cannot read ({shown(', '.join(names))}): "
        "every answer to them counts as not correct"
    )
