"""Sums of gradients that do not depend on how they are grouped: whole numbers of a small quantum.

Floating-point sums depend on their order, so that parts summed by two workers and then together would differ in the
last bits from the same parts summed by four. Each part's gradient is rounded to a multiple of a quantum q first:

    n = round(g / q),    q = 2^-44 in the first place,

and whole numbers of 64 bits add up to the same sum in any order. A part whose |n| could make a sum overflow is told
(None), and all parts are asked again with a quantum 2^16 times as large; whether that happens depends on the parts
alone. The rounding, at most q / 2 = 3e-14 for each part, is far below that of the float32 gradient itself but for
gradients of 1e-7 and less, below which AdamW's epsilon of 1e-8 rules.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 6
"""Quanta to try, from 2^-44 to 2^36; a gradient that overflows the last is none that anything could be learnt from."""
_FINEST, _STEP, _BITS = -44, 16, 62
Whole = NDArray[np.int64]


def exponent(level: int) -> int:
    """Of the quantum of a level, a power of two."""
    return _FINEST + _STEP * level


def whole(gradient_N: NDArray[np.float32], level: int, parts: int) -> Whole | None:
    """The gradient (N,) in quanta; None where a sum of so many parts like it could overflow, or it is not finite."""
    scaled_N = np.ldexp(gradient_N.astype(np.float64), -exponent(level)).round()
    if not np.abs(scaled_N).max(initial=0.0) * parts < 2.0**_BITS:
        return None
    return scaled_N.astype(np.int64)


def gradient(sum_N: Whole, level: int) -> NDArray[np.float32]:
    """The sum (N,) of parts as a gradient."""
    return np.ldexp(sum_N.astype(np.float64), exponent(level)).astype(np.float32)
