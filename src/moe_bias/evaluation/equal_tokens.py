"""Accuracy at equal tokens: what the kept samples of an arm say of every limit below the one that they had.

    right within L    a sample is right, ended by itself, and has at most L tokens, end token included
    spent under L     min(tokens, L)

Each is averaged over a problem's samples, then over problems. A shorter limit changes no token before it, so greedy
answers, and the first sample of each problem, are to the token what an evaluation with limit L would give; of several
samples of a problem the later ones draw other random numbers there, and agree in distribution. One thing differs: an
evaluation reads what was cut too, and may find a right answer in it. Here it does not count, for whoever waits for the
end of an answer does not have it; so the last point of a curve lies below avg@n by those.

Shapes: P problems, L limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_bias.evaluation.samples import Sample
from moe_bias.evaluation.statistics import Estimate, Floats, means, shares

LIMITS = 24
"""Points of a curve, at equal distances up to the longest answer of any arm."""

Answered = Mapping[str, Sequence[Sample]]
"""An arm's samples by problem."""


@dataclass(frozen=True)
class AtLimit:
    """An arm under a limit of tokens: the share of samples that are right within it, and the mean tokens spent.

    `change` is the paired difference of that share to the first arm under the same limit, None for that arm itself.
    """

    limit: int
    accuracy: Estimate
    tokens: float
    change: Estimate | None


def limits_of(arms: Sequence[Answered]) -> list[int]:
    """The limits that these arms are compared under; none where a length is not known."""
    lengths = [sample.tokens for arm in arms for group in arm.values() for sample in group]
    known = [length for length in lengths if length is not None]
    if not known or len(known) < len(lengths):
        return []
    return sorted({-(-max(known) * number // LIMITS) for number in range(1, LIMITS + 1)} - {0})


def shown_limits(limits: Sequence[int]) -> list[int]:
    """Those of a curve's that a table has: an eighth, a quarter, a half and three quarters of the last, and that."""
    last = len(limits)
    places = sorted({max(-(-last * part // 8), 1) for part in (1, 2, 4, 6, 8)}) if limits else []
    return [limits[place - 1] for place in places]


def at_limits(arm: Answered, first: Answered | None, limits: Sequence[int]) -> list[AtLimit]:
    """The arm under each limit, compared with the first arm where it is another one on the same problems."""
    right_PL = right_within(arm, limits)
    spent_L = np.array([np.minimum(_tokens(group)[:, None], limits).mean(0) for group in arm.values()]).mean(0)
    changes: Sequence[Estimate | None] = [None] * len(limits)
    if first is not None:
        changes = means(right_PL - right_within({name: first[name] for name in arm}, limits))
    rows = zip(limits, shares(right_PL), spent_L.tolist(), changes, strict=True)
    return [AtLimit(*row) for row in rows]


def right_within(arm: Answered, limits: Sequence[int]) -> Floats:
    """By problem and limit (P, L), the share of the samples that are right within it."""
    within = [_ended_right(group)[:, None] & (_tokens(group)[:, None] <= limits) for group in arm.values()]
    return np.array([right.mean(0) for right in within])


def _ended_right(group: Sequence[Sample]) -> npt.NDArray[np.bool_]:
    return np.array([sample.is_correct and sample.finished for sample in group])


def _tokens(group: Sequence[Sample]) -> Floats:
    return np.array([sample.tokens for sample in group], dtype=np.float64)
