import numpy as np
import pytest

from moe_bias.evaluation.statistics import mean, ratio_of_sums, wilson
from moe_bias.experiments.comparison import Measured, compare


def test_wilson_by_hand():
    # 5 of 10 at z = 1.96: centre 0.5, half-width z sqrt(10 * 0.25 + z^2 / 4) / (10 + z^2) = 0.2634.
    estimate = wilson(5, 10)
    assert estimate.value == 0.5
    assert estimate.low == pytest.approx(0.2366, abs=1e-4)
    assert estimate.high == pytest.approx(0.7634, abs=1e-4)


def test_wilson_at_the_ends_stays_within_0_and_1():
    assert wilson(0, 20).low == 0
    assert wilson(0, 20).high > 0.1
    assert wilson(20, 20).high == 1


def test_ratio_of_sums_weighs_problems_by_their_tokens():
    # 1 nat over 1 token and 1 nat over 3 tokens are 2 / 4 nats per token, not (1 + 1/3) / 2.
    assert ratio_of_sums(np.array([1.0, 1.0]), np.array([1.0, 3.0])).value == 0.5


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        estimate = mean(rng.normal(1.0, 2.0, size=80))
        covered += estimate.low <= 1.0 <= estimate.high
    assert 50 <= covered <= 60


def test_paired_changes_see_what_separate_intervals_cannot():
    rng = np.random.default_rng(0)
    tokens = np.full(100, 10.0)
    base = rng.normal(20, 8, 100)
    arms = [
        Measured("base", 0, base, np.zeros(100), tokens, np.ones(100)),
        Measured("better", 5, base - 0.5 + rng.normal(0, 0.2, 100), np.ones(100), tokens / 2, np.zeros(100)),
    ]
    first, second = compare(arms, tokens)
    assert first.nll_change is None
    assert first.cut == 1
    assert second.nll_change is not None
    assert second.nll_change.excludes_zero
    assert second.nll_change.value == pytest.approx(-0.05, abs=0.01)
    assert second.nll.low < first.nll.value < second.nll.high
    assert second.accuracy_change is not None
    assert second.accuracy_change.value == 1
    assert second.tokens.value == 5
