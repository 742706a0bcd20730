"""Drawing tokens from logits, with the log-probability and the entropy of what they are drawn from.

With c = u - max u, exactly by inversion: the token is the first whose running sum of e^c exceeds
`x sum e^c`, for a number x that is uniform in [0, 1). One number a token, where a Gumbel or exponential
trick takes one a logit, and a row's number can be its own whatever rows are beside it. Sums run in
float64, so that a token of probability 1e-12 still has its place; then

    log pi(y) = c_y - log sum e^c        H = log sum e^c - sum e^c c / sum e^c

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.chunks import PIECE
from moe_bias.columns import Columns, joined
from moe_bias.layer import LOWEST_LOG_PROB


@dataclass(frozen=True)
class Draws(Columns):
    """Drawn tokens (B,) int64, their log-probability and the distribution's entropy in nats (B,) float32."""

    token: Tensor
    log_prob: Tensor
    entropy: Tensor


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Draws:
    """A token of softmax(logits) for each row, from float32 logits and float64 numbers uniform in [0, 1)."""
    rows = PIECE.rows(logits_BV.shape[-1], logits_BV.device)
    return joined([_draw(*piece) for piece in zip(logits_BV.split(rows), uniform_B.split(rows), strict=True)])


def nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """The logits, and -inf off the fewest most likely tokens that together hold `top_p` (arXiv 1904.09751)."""
    ordered_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = ordered_BV.softmax(-1, dtype=torch.float64)
    is_off_BV = mass_BV.cumsum(-1) - mass_BV >= top_p
    return torch.empty_like(logits_BV).scatter_(-1, token_BV, ordered_BV.masked_fill_(is_off_BV, -torch.inf))


def _draw(logits_BV: Tensor, uniform_B: Tensor) -> Draws:
    centred_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).clamp_(min=LOWEST_LOG_PROB)
    mass_BV = centred_BV.exp()
    running_BV = mass_BV.cumsum(-1, dtype=torch.float64)
    total_B = running_BV[:, -1]
    token_B = _first_above(running_BV, uniform_B * total_B)
    log_total_B = total_B.log()
    entropy_B = log_total_B - torch.linalg.vecdot(mass_BV, centred_BV) / total_B
    log_prob_B = centred_BV.gather(-1, token_B[:, None]).squeeze(-1) - log_total_B
    return Draws(token_B, log_prob_B.float(), entropy_B.float())


def _first_above(running_BV: Tensor, level_B: Tensor) -> Tensor:
    """Where each running sum first exceeds its level; a level rounded up to the whole sum is just below it."""
    total_B = running_BV[:, -1]
    level_B = torch.minimum(level_B, total_B.nextafter(torch.zeros_like(total_B)))
    return torch.searchsorted(running_BV, level_B[:, None], right=True).squeeze(-1)
