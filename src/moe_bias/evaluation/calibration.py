"""Whether a classifier is right as often as it says: the expected calibration error (Guo et al., arXiv 1706.04599).

Texts are put into M = 15 bins of equal width by their confidence, the probability of the label that is chosen; bin m
holds those in ((m - 1) / M, m / M]. With |B_m| texts in a bin, the share acc(B_m) of them right and mean confidence
conf(B_m),

    ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)|

Of several seeds on the same texts it is the mean over the seeds. Intervals resample the texts. A resample has more
noise within its bins than the texts themselves, so its ECE is larger: intervals are therefore basic bootstrap intervals
(twice the value less the quantiles), which take that off, and end at 0 from below.

Shapes: S seeds, N texts, K labels, M bins.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

from moe_bias.evaluation.statistics import CONFIDENCE, Estimate, Floats

BINS = 15
_RESAMPLES = 2000
_AT_ONCE = 100


def expected_calibration_error(confidence_N: Floats, right_N: Floats, bins: int = BINS) -> float:
    """The error of choices with these confidences in [0, 1]; `right_N` is 1 where a choice is right, else 0."""
    return float(np.abs(_gaps(confidence_N, right_N, bins).sum(0)).sum() / len(confidence_N))


def calibration_error(prob_SNK: Floats, gold_N: Floats) -> Estimate:
    """The error of probabilities of labels, the mean over seeds, with its interval."""
    found = _estimate([_gaps_of(prob_NK, gold_N) for prob_NK in prob_SNK], [])
    return Estimate(found.value, max(found.low, 0.0), max(found.high, 0.0))


def calibration_change(prob_SNK: Floats, before_SNK: Floats, gold_N: Floats) -> Estimate:
    """The error of the first probabilities less that of the second ones, paired by text."""
    return _estimate(
        [_gaps_of(prob_NK, gold_N) for prob_NK in prob_SNK], [_gaps_of(prob_NK, gold_N) for prob_NK in before_SNK]
    )


def _gaps_of(prob_NK: Floats, gold_N: Floats) -> Floats:
    return _gaps(prob_NK.max(-1), (prob_NK.argmax(-1) == gold_N).astype(np.float64), BINS)


def _gaps(confidence_N: Floats, right_N: Floats, bins: int) -> Floats:
    """`right - confidence` of each text in the column of its bin, (N, M)."""
    place_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    gap_NM = np.zeros((len(confidence_N), bins))
    gap_NM[np.arange(len(confidence_N)), place_N] = right_N - confidence_N
    return gap_NM


def _estimate(after: list[Floats], before: list[Floats]) -> Estimate:
    """Mean error over the seeds `after` less that of the seeds `before`, if any."""

    def statistic(index: npt.NDArray[np.int64], axis: int = -1) -> Floats:
        count = index.shape[axis]
        errors = [np.abs(gap_NM[index].sum(-2)).sum(-1) / count for gap_NM in after]
        others = [np.abs(gap_NM[index].sum(-2)).sum(-1) / count for gap_NM in before]
        difference: Floats = np.mean(errors, axis=0) - (np.mean(others, axis=0) if others else 0.0)
        return difference

    texts = np.arange(len(after[0]), dtype=np.int64)
    value = float(statistic(texts))
    interval = bootstrap(
        (texts,),
        statistic,
        n_resamples=_RESAMPLES,
        batch=_AT_ONCE,
        confidence_level=CONFIDENCE,
        method="basic",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
