"""One arm of a comparison, measured on the same held-out problems as the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_bias.evaluation.statistics import Estimate, Floats, mean, ratio_of_sums, wilson


@dataclass(frozen=True)
class Measured:
    """What was seen of an arm, by problem: summed NLL in nats, correctness, tokens and whether cut off."""

    name: str
    parameters: int
    nll: Floats
    correct: Floats
    tokens: Floats
    cut: Floats


@dataclass(frozen=True)
class Arm:
    """An arm's estimates; `*_change` are paired differences to the arm before it, None for the first.

    `nll` is in nats per completion token, `accuracy` and `cut` are shares of problems, `tokens` the
    mean length of an answer.
    """

    name: str
    parameters: int
    nll: Estimate
    nll_change: Estimate | None
    accuracy: Estimate
    accuracy_change: Estimate | None
    tokens: Estimate
    cut: float


def compare(measured: Sequence[Measured], token_counts: Floats) -> list[Arm]:
    """Arms with intervals, each against the one before it. `token_counts` are held-out tokens by problem."""
    before: list[Measured | None] = [None, *measured[:-1]]
    return [_arm(arm, previous, token_counts) for arm, previous in zip(measured, before, strict=True)]


def _arm(arm: Measured, previous: Measured | None, token_counts: Floats) -> Arm:
    return Arm(
        name=arm.name,
        parameters=arm.parameters,
        nll=ratio_of_sums(arm.nll, token_counts),
        nll_change=None if previous is None else ratio_of_sums(arm.nll - previous.nll, token_counts),
        accuracy=wilson(int(arm.correct.sum()), len(arm.correct)),
        accuracy_change=None if previous is None else mean(arm.correct - previous.correct),
        tokens=mean(arm.tokens),
        cut=float(np.mean(arm.cut)),
    )
