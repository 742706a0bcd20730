"""How a loss falls with the number of training tokens, and what more tokens would bring.

The curve is a power law above an asymptote, `L + b x^-a` of x = tokens over the most that were measured. Four to a
dozen noisy points do not fix three parameters: a least-squares fit alone would state one of many curves that explain
them equally well. So a is taken on a grid. For each a the curve is linear in L and b, whose posterior under flat priors
and unknown noise is a Student t in closed form; grid points weigh as well as they explain the points. Curves are drawn
from that, those with L < 0 or b < 0 left out, and what is told is the median and the central 95% of what they say.
The noise is that of the points about the curve: several trainings on different tokens of one number tell it.

Where the loss falls by nearly as much with each doubling the asymptote cannot be told, while the loss at two or four
times the tokens can. So saturation is by what is gained: it is reached where twice the tokens gain less than
`SATURATED_NATS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_bias.evaluation.statistics import CONFIDENCE, Estimate, Floats

SATURATED_NATS = 0.01
"""Nats per token that twice the tokens must gain to be worth it."""
LOOSE = 0.25
"""A forecast whose interval is wider than this share of what was gained so far says nothing."""
FURTHEST = 16.0
"""Times the tokens that were measured, beyond which no saturation is told."""
_EXPONENTS = np.geomspace(0.05, 2.0, 400)
_DRAWS = 4000
_LEAST_NOISE = 5e-4
"""Nats: the rounding and resampling of a loss, below which points never agree with a curve."""
_LEAST_ACCEPTED = 0.05


@dataclass(frozen=True)
class Point:
    """A training on so many tokens and its loss in nats per token."""

    tokens: int
    nll: float


@dataclass(frozen=True)
class Forecast:
    """What the curve says of more tokens; `reason` says why where it says nothing, and is empty else.

    `nll` is by number of tokens, in nats per token, and holds what can be told alone. `saturation` is the number of
    tokens from which twice as many gain less than `SATURATED_NATS`; None where it cannot be told, and then
    `not_before` is what it is at least, where that is more than was measured. `asymptote` is L, where it can be told.
    """

    nll: dict[int, Estimate]
    saturation: Estimate | None
    not_before: float | None
    asymptote: Estimate | None
    reason: str = ""


def forecast(points: Sequence[Point], base_nll: float, times: Sequence[int] = (2, 4), seed: int = 0) -> Forecast:
    """The loss at `times` the most tokens measured, with intervals over curves; `base_nll` is that without training.

    Nothing is told where the loss at the most tokens is not below the base's, where there are fewer than four
    points of three different numbers of tokens, and where few falling curves explain them.
    """
    sizes = np.array([point.tokens for point in points], dtype=np.float64)
    nll = np.array([point.nll for point in points], dtype=np.float64)
    if len(points) < 4 or len(np.unique(sizes)) < 3:
        return _nothing(f"{len(points)} trainings of {len(np.unique(sizes))} sizes are too few for a curve")
    most = float(sizes.max())
    gained = base_nll - float(nll[sizes == most].mean())
    if gained <= SATURATED_NATS:
        return _nothing(f"at {most:,.0f} tokens the gain is {gained:.3f} nats: there is nothing to extrapolate")
    curves = _curves(sizes / most, nll, seed)
    if curves is None:
        return _nothing("the loss does not fall with the tokens in a way that a curve explains")
    found = {round(count * most): _central(curves.at(float(count))) for count in times}
    told = {tokens: value for tokens, value in found.items() if value.high - value.low <= LOOSE * gained}
    loose = next((value for tokens, value in found.items() if tokens not in told), None)
    reason = "" if loose is None else f"the curves that explain the points differ by {loose.high - loose.low:.3f} nats"
    asymptote = _central(curves.asymptote)
    is_told = asymptote.high - asymptote.low <= LOOSE * gained
    return Forecast(told, *_saturation(curves, sizes), asymptote if is_told else None, reason)


@dataclass(frozen=True)
class _Curves:
    """Drawn curves: L, b and a of each."""

    asymptote: Floats
    height: Floats
    exponent: Floats

    def at(self, size: float) -> Floats:
        """The loss of each at a size in the most tokens measured."""
        return self.asymptote + self.height * size**-self.exponent

    def saturated_at(self) -> Floats:
        """The size of each from which doubling gains less than `SATURATED_NATS`: `b x^-a (1 - 2^-a)` is that."""
        first = self.height * (1 - 2**-self.exponent)
        with np.errstate(over="ignore"):
            size: Floats = (first / SATURATED_NATS) ** (1 / self.exponent)
        return size


def _curves(size: Floats, nll: Floats, seed: int) -> _Curves | None:
    """Draws from the posterior; None where nearly all have a negative part."""
    rng, freedom = np.random.default_rng(seed), len(size) - 2
    fits = [_linear(size**-exponent, nll) for exponent in _EXPONENTS]
    squares = np.array([fit.squares for fit in fits])
    weights = -0.5 * np.array([fit.log_determinant for fit in fits]) - freedom / 2 * np.log(squares)
    share = np.exp(weights - weights.max())
    chosen = rng.choice(len(fits), size=_DRAWS, p=share / share.sum())
    noise = np.sqrt(squares[chosen] / rng.chisquare(freedom, _DRAWS))
    spread = np.stack([fit.spread for fit in fits])[chosen]
    normal = rng.standard_normal((_DRAWS, 2))
    drawn = np.stack([fit.best for fit in fits])[chosen] + noise[:, None] * np.einsum("nij,nj->ni", spread, normal)
    accepted = (drawn >= 0).all(-1)
    if accepted.mean() < _LEAST_ACCEPTED:
        return None
    return _Curves(drawn[accepted, 0], drawn[accepted, 1], _EXPONENTS[chosen[accepted]])


@dataclass(frozen=True)
class _Linear:
    """Least squares of `L + b f`: (L, b), a root of the inverse of X'X, log |X'X|, and the squared residuals' sum."""

    best: Floats
    spread: Floats
    log_determinant: float
    squares: float


def _linear(feature: Floats, nll: Floats) -> _Linear:
    design = np.stack([np.ones_like(feature), feature], axis=-1)
    q, r = np.linalg.qr(design)
    best = np.linalg.solve(r, q.T @ nll)
    residual = nll - design @ best
    squares = float(residual @ residual) + len(nll) * _LEAST_NOISE**2
    return _Linear(best, np.linalg.inv(r), 2 * float(np.log(np.abs(np.diag(r))).sum()), squares)


def _saturation(curves: _Curves, sizes: Floats) -> tuple[Estimate | None, float | None]:
    """Where doubling stops to pay, not below the fewest tokens measured, and else what that is at least; in tokens."""
    most = float(sizes.max())
    found = _central(np.clip(curves.saturated_at(), sizes.min() / most, 2 * FURTHEST))
    if found.high <= FURTHEST:
        return Estimate(found.value * most, found.low * most, found.high * most), None
    return None, min(found.low, FURTHEST) * most if found.low > 1 else None


def _central(values: Floats) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, middle, high = np.quantile(values, [tail, 0.5, 1 - tail])
    return Estimate(float(middle), float(low), float(high))


def _nothing(reason: str) -> Forecast:
    return Forecast({}, None, None, None, reason)
