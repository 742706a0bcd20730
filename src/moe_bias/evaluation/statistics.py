"""Intervals, and how they are written: Wilson for a share, paired bootstrap over problems for all else (scipy)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 4000
_DRAWN = 2**22
"""Problems drawn at once, which bounds the memory of an interval."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval at the level `CONFIDENCE`."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def estimate_of(found: Mapping[str, float | None]) -> Estimate:
    """An estimate of a record, where an interval that there is not has null for its ends.

    Raises TypeError on anything but numbers: texts would be drawn, and long ones searched for dates.
    """
    for name, value in found.items():
        if not isinstance(value, int | float | None):
            raise TypeError(f"{name} is a {type(value).__name__}, not a number")
    return Estimate(**{name: nan if value is None else value for name, value in found.items()})


def with_interval(estimate: Estimate, form: str, scale: float = 1.0) -> str:
    """`0.956 [0.914, 1.000]`, or the value alone where it has no interval."""
    if isnan(estimate.low):
        return form.format(scale * estimate.value)
    value, low, high = (form.format(scale * part) for part in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def percent(estimate: Estimate) -> str:
    """A share in percent, without the sign."""
    return with_interval(estimate, "{:.1f}", 100)


def points(estimate: Estimate) -> str:
    """A change of a share in percentage points."""
    return with_interval(estimate, "{:+.1f}", 100)


def wilson(successes: int, trials: int) -> Estimate:
    """A share with its Wilson score interval."""
    interval = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def ratio_of_sums(numerator: Floats, denominator: Floats, seed: int = 0) -> Estimate:
    """`sum numerator / sum denominator` over problems, resampled by problem (percentile bootstrap).

    With summed losses and token counts per problem this is the loss per token, and with differences
    of summed losses the paired difference per token: tokens of one problem are not independent.
    """

    def statistic(top: Floats, bottom: Floats, axis: int = -1) -> Floats:
        share: Floats = top.sum(axis=axis) / bottom.sum(axis=axis)
        return share

    result = bootstrap(
        (numerator, denominator),
        statistic,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    value = float(numerator.sum() / denominator.sum())
    return Estimate(value, float(interval.low), float(interval.high))


def mean(values: Floats, seed: int = 0) -> Estimate:
    """The mean over problems, resampled by problem."""
    return ratio_of_sums(values, np.ones_like(values), seed)


def means(values_PL: Floats, seed: int = 0) -> list[Estimate]:
    """`mean` of each of L columns of values of P problems: the same draws of problems for all, in one product."""
    problems = len(values_PL)
    generator, at_once = np.random.default_rng(seed), max(_DRAWN // problems, 1)
    found = []
    for start in range(0, RESAMPLES, at_once):
        drawn_RP = generator.integers(0, problems, (min(at_once, RESAMPLES - start), problems))
        drawn_RP += problems * np.arange(len(drawn_RP))[:, None]
        times_RP = np.bincount(drawn_RP.ravel(), minlength=drawn_RP.size).reshape(drawn_RP.shape)
        found.append(times_RP @ values_PL / problems)
    tail = (1 - CONFIDENCE) / 2
    low_L, high_L = np.quantile(np.concatenate(found), [tail, 1 - tail], axis=0)
    return [Estimate(*map(float, row)) for row in zip(values_PL.mean(0), low_L, high_L, strict=True)]


def shares(values_PL: Floats, seed: int = 0) -> list[Estimate]:
    """`share` of each of L columns of values of P problems, as `means` draws them."""
    return [
        share(column_P) if np.all(column_P == column_P[0]) else estimate
        for column_P, estimate in zip(values_PL.T, means(values_PL, seed), strict=True)
    ]


def share(values: Floats, seed: int = 0) -> Estimate:
    """The mean over problems of a share of each, resampled by problem.

    Where every problem has 0, or every one 1, resampling sees no spread at all; Wilson's interval, with
    problems as trials, stands there instead.
    """
    if np.all(values == values[0]) and values[0] in (0.0, 1.0):
        return wilson(int(values.sum()), len(values))
    return mean(values, seed)
