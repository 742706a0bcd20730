"""What a verifier says of one answer: an outcome, the answer that it read, and the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Outcome = Literal["correct", "wrong", "unparseable", "timed out", "bad gold"]
"""`unparseable`: nothing that can be read as an answer. `timed out`: the answer stopped its grader by taking too long,
or by ending it. `bad gold`: the task's own answer cannot be read, so nothing is known of the completion."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Verdict:
    """The outcome, the answer as it stands in the completion (None where none was read), the reward from 0 to 1."""

    outcome: Outcome
    answer: str | None
    reward: float

    @property
    def is_correct(self) -> bool:
        """Whether the outcome is `correct`."""
        return self.outcome == "correct"


def judged(is_correct: bool, answer: str | None) -> Verdict:
    """The verdict on an answer that could be graded: right with reward 1, or wrong with 0."""
    return Verdict("correct", answer, 1.0) if is_correct else Verdict("wrong", answer, 0.0)


def failed(outcome: Outcome, answer: str | None = None) -> Verdict:
    """The verdict without reward on an answer that could not be graded, and why."""
    return Verdict(outcome, answer, 0.0)
