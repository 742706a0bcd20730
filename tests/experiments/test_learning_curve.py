"""The curve of losses by tokens: curves that are known are found again, and what cannot be told is not."""

import numpy as np
import pytest

from moe_bias.experiments.learning_curve import Point, forecast

SIZES = (6000, 6000, 12000, 12000, 24000, 24000, 48000)


def points(asymptote, height, exponent, noise=0.0, seed=0):
    """A power law whose unit is the most tokens."""
    drawn = np.random.default_rng(seed).standard_normal(len(SIZES))
    return [
        Point(size, asymptote + height * (size / max(SIZES)) ** -exponent + noise * float(error))
        for size, error in zip(SIZES, drawn, strict=True)
    ]


@pytest.mark.parametrize(("asymptote", "height", "exponent"), [(0.8, 0.1, 0.5), (0.9, 0.05, 1.0)])
def test_a_known_curve_is_found(asymptote, height, exponent):
    found = forecast(points(asymptote, height, exponent), 1.3)
    for times in (2, 4):
        true, told = asymptote + height * times**-exponent, found.nll[times * max(SIZES)]
        assert told.low <= true <= told.high
        assert abs(told.value - true) < 0.002
    assert found.asymptote.low <= asymptote <= found.asymptote.high
    # doubling gains b x^-a (1 - 2^-a); it is 0.01 at x = (b (1 - 2^-a) / 0.01)^(1/a)
    true = max(SIZES) * (height * (1 - 2**-exponent) / 0.01) ** (1 / exponent)
    assert found.saturation.low <= true <= found.saturation.high
    assert found.reason == ""


def test_the_interval_covers_as_often_as_it_says():
    """Twenty curves with noise: nineteen of the intervals hold what four times the tokens give, about."""
    held = []
    for seed in range(20):
        found = forecast(points(0.9, 0.06, 0.6, noise=0.002, seed=seed), 1.4).nll.get(4 * max(SIZES))
        held.append(found is not None and found.low <= 0.9 + 0.06 * 4**-0.6 <= found.high)
    assert sum(held) >= 18


def test_one_that_has_flattened_is_saturated():
    found = forecast(points(1.0, 1e-6, 0.5, noise=1e-3), 1.3)
    assert found.saturation.high <= max(SIZES)
    assert abs(found.nll[2 * max(SIZES)].value - 1.0) < 0.002


def test_without_an_asymptote_in_sight_none_is_told():
    """The same fall with each doubling: twice the tokens are foretold, where it ends is not."""
    halvings = [Point(size, 1.0 - 0.02 * np.log2(size / 6000)) for size in SIZES]
    found = forecast(halvings, 1.3)
    assert found.asymptote is None
    assert found.saturation is None
    assert found.not_before > 2 * max(SIZES)
    assert abs(found.nll[2 * max(SIZES)].value - 0.92) < 0.01


@pytest.mark.parametrize(
    ("curve", "base", "reason"),
    [
        (points(1.3, 0.0, 0.5, noise=0.003), 1.3, "there is nothing to extrapolate"),
        (points(0.9, 0.05, 0.5, noise=0.05), 1.3, "the curves that explain the points differ by"),
        (points(0.9, 0.0, 0.5)[:3], 1.3, "3 trainings of 2 sizes are too few for a curve"),
        (
            [Point(size, 0.9 + 0.1 * size / 48000) for size in SIZES],
            1.3,
            "the loss does not fall with the tokens in a way that a curve explains",
        ),
    ],
)
def test_what_cannot_be_told_has_a_reason(curve, base, reason):
    found = forecast(curve, base)
    assert found.nll == {}
    assert found.asymptote is None
    assert reason in found.reason


def test_the_same_seed_tells_the_same():
    curve = points(0.8, 0.1, 0.5, noise=0.002)
    assert forecast(curve, 1.3, seed=3) == forecast(curve, 1.3, seed=3)
    assert forecast(curve, 1.3, seed=3) != forecast(curve, 1.3, seed=4)
