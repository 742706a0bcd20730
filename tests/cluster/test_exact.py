"""Sums that do not depend on their grouping, against sums in float64."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_bias.cluster import exact

floats = st.floats(-1e4, 1e4, width=32)
parts_of = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.lists(floats, min_size=size, max_size=size), min_size=1, max_size=12)
)


def summed(parts, level, order):
    total = np.zeros(len(parts[0]), np.int64)
    for number in order:
        total += exact.whole(np.array(parts[number], np.float32), level, len(parts))
    return exact.gradient(total, level)


@given(parts_of, st.randoms())
def test_any_order_and_grouping_gives_the_same_bits_near_the_sum_in_float64(parts, draw):
    order = list(range(len(parts)))
    first = summed(parts, 1, order)
    draw.shuffle(order)
    assert summed(parts, 1, order).tobytes() == first.tobytes()
    reference = np.sum(np.array(parts, np.float64), axis=0)
    bound = len(parts) * 2.0 ** (exact.exponent(1) - 1) + 2.0**-24 * np.abs(reference)
    assert (np.abs(first - reference) <= bound).all()


@given(st.integers(0, exact.LEVELS - 1), st.integers(1, 64), floats)
def test_what_could_overflow_is_told_and_what_is_not_finite(level, parts, value):
    row = np.array([value], np.float32)
    found = exact.whole(row, level, parts)
    fits = abs(np.ldexp(float(row[0]), -exact.exponent(level))) * parts < 2.0**62
    assert (found is not None) == fits
    if found is not None:
        assert abs(int(found[0])) * parts < 2**63
    for broken in (np.nan, np.inf, -np.inf):
        assert exact.whole(np.array([broken], np.float32), level, parts) is None
    assert exact.whole(np.array([], np.float32), level, parts) is not None
