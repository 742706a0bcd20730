"""Greedy answers to problems under the frozen model and under a layer: where they part, and what came of it.

Up to the first token that differs both answers are one text, so there, and only there, the layer's effect on
what follows is one change of the choice: a flip. A flip mends an answer that was wrong and then is right, and
spoils one that was right and then is wrong. What comes after it is the layer's work as well: the answer is not
the frozen model's own continuation of the flipped token.

The layer is also run on tokens of one stratum alone, the frozen model on the others, which tells what the
flips of that stratum are worth in right answers. The stratum's threshold is that of the frozen model's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from moe_bias.evaluation.statistics import Estimate, mean, wilson
from moe_bias.layer import entropy_from_logits
from moe_bias.rollout.policy import Policy
from moe_bias.tasks.verdict import Outcome

BASE, ADAPTED, HIGH_ONLY, LOW_ONLY = "base", "adapted", "adapted, high only", "adapted, low only"
RIGHT: Outcome = "correct"


@dataclass(frozen=True)
class Answered:
    """One greedy answer: token ids, the end token included where it came, and the verdict's outcome."""

    token_ids: list[int]
    outcome: Outcome


@dataclass(frozen=True)
class Accuracy:
    """By arm the share of problems answered right, and the paired change against the frozen model."""

    share: dict[str, Estimate]
    change: dict[str, Estimate]


def in_stratum(policy: Policy, threshold: float, is_high: bool) -> Policy:
    """The policy where base entropy is at least the threshold, or where it is below; the frozen model elsewhere."""

    def chosen(hidden_BD: Tensor, logits_BV: Tensor) -> Tensor:
        mine_B = (entropy_from_logits(logits_BV) >= threshold) == is_high
        return torch.where(mine_B[:, None], policy(hidden_BD, logits_BV), logits_BV)

    return chosen


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The place of the first token in which two answers differ, None where they are the same."""
    for place, (ours, theirs) in enumerate(zip_longest(one, other)):
        if ours != theirs:
            return place
    return None


def accuracy(answers: dict[str, list[Answered]]) -> Accuracy:
    """Of the arms, the frozen model's among them, on the same problems."""
    right = {arm: np.array([float(answer.outcome == RIGHT) for answer in found]) for arm, found in answers.items()}
    return Accuracy(
        {arm: wilson(int(values.sum()), len(values)) for arm, values in right.items()},
        {arm: mean(values - right[BASE]) for arm, values in right.items() if arm != BASE},
    )


def turns(base: Sequence[Answered], adapted: Sequence[Answered]) -> dict[str, int]:
    """How many problems each pair of outcomes has: mended, spoiled, right or wrong under both."""
    pairs = [(before.outcome == RIGHT, after.outcome == RIGHT) for before, after in zip(base, adapted, strict=True)]
    return {
        "mended": pairs.count((False, True)),
        "spoiled": pairs.count((True, False)),
        "both right": pairs.count((True, True)),
        "both wrong": pairs.count((False, False)),
    }
