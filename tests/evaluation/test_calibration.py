import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_bias.evaluation.calibration import calibration_change, calibration_error, expected_calibration_error


def plain_error(confidence, right, bins) -> float:
    """The definition of arXiv 1706.04599, a bin after the other."""
    total, count = 0.0, len(confidence)
    for number in range(1, bins + 1):
        inside = [n for n in range(count) if (number - 1) / bins < confidence[n] <= number / bins]
        if inside:
            accuracy = sum(right[n] for n in inside) / len(inside)
            certainty = sum(confidence[n] for n in inside) / len(inside)
            total += len(inside) / count * abs(accuracy - certainty)
    return total


def test_a_hand_worked_error():
    # two bins: (0, 0.5] holds 0.3 (right) and 0.5 (wrong), (0.5, 1] holds 0.6 (right), 0.9 (right) and 1.0 (wrong)
    # |1/2 - 0.4| * 2/5 + |2/3 - 2.5/3| * 3/5 = 0.04 + 0.1
    confidence, right = np.array([0.3, 0.5, 0.6, 0.9, 1.0]), np.array([1.0, 0, 1, 1, 0])
    assert expected_calibration_error(confidence, right, bins=2) == pytest.approx(0.14)


def test_gaps_of_different_bins_do_not_cancel():
    # always sure by half and right half the time on the whole, but never in the one bin and always in the other
    confidence, right = np.array([0.4, 0.6]), np.array([1.0, 0.0])
    assert expected_calibration_error(confidence, right, bins=1) == pytest.approx(0.0)
    assert expected_calibration_error(confidence, right, bins=2) == pytest.approx(0.6)


@given(st.data(), st.integers(1, 40), st.sampled_from([1, 2, 15, 16]))
def test_it_is_the_plain_definition(data, count, bins):
    # multiples of 1/32 are exact, so that edges of 2 and 16 bins are met; 15ths are not
    confidence = data.draw(arrays(np.float64, count, elements=st.integers(1, 32).map(lambda n: n / 32)))
    right = data.draw(arrays(np.float64, count, elements=st.sampled_from([0.0, 1.0])))
    found = expected_calibration_error(confidence, right, bins)
    assert found == pytest.approx(plain_error(confidence, right, bins), abs=1e-12)
    assert 0 <= found <= 1


def sure(count: int, confidence: float, gold: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Probabilities (1, N, 2) that choose rightly where told, with this confidence."""
    chosen = np.where(right, gold, 1 - gold)
    prob = np.full((count, 2), 1 - confidence)
    prob[np.arange(count), chosen] = confidence
    return prob[None]


def test_an_interval_holds_the_error_that_it_is_of_and_a_change_is_paired():
    random = np.random.default_rng(1)
    gold, right = random.integers(0, 2, 400), random.random(400) < 0.8
    honest, boastful = sure(400, 0.8, gold, right), sure(400, 0.99, gold, right)
    low, high = calibration_error(honest, gold), calibration_error(boastful, gold)
    assert low.value == pytest.approx(abs(right.mean() - 0.8))
    assert high.value == pytest.approx(0.99 - right.mean())
    assert low.low >= 0
    assert high.low < 0.99 - 0.8 < high.high
    change = calibration_change(boastful, honest, gold)
    assert change.value == pytest.approx(high.value - low.value)
    assert change.excludes_zero
    same = calibration_change(honest, honest, gold)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_of_several_seeds_it_is_the_mean():
    gold = np.array([0, 1, 1, 0])
    one = np.array([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]])
    other = np.array([[[0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.9, 0.1]]])
    both = calibration_error(np.concatenate([one, other]), gold).value
    assert both == pytest.approx((calibration_error(one, gold).value + calibration_error(other, gold).value) / 2)
