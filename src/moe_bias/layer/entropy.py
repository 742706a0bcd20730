"""The base's entropy, and the types that it and the layer compute in.

Shapes: N rows, V vocabulary; any leading shape where a docstring says `...`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_bias.chunks import ENTROPY

LARGEST_INPUT = 65504.0
"""The largest number of half precision: hidden states and weights of a model are not beyond it."""
LOWEST_LOG_PROB = -1e4
"""Log-probabilities are raised to this before `p log p`: exp(-1e4) is 0 in float32 and in float64,
so no value changes, and 0 * -inf cannot arise."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged where its type is already wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) over the last axis, in float32 or better, without gradient.

    `logits` (..., V) of any float type; returns (...,). Entries of -inf have probability 0.
    With c = z - max z the entropy is `log sum e^c - sum e^c c / sum e^c`, two terms of one sign, so
    that nothing cancels.
    """
    with torch.no_grad():
        logits = at_least_float32(logits)
        centred = (logits - logits.amax(-1, keepdim=True)).clamp_(min=LOWEST_LOG_PROB)
        mass = centred.exp()
        total = mass.sum(-1)
        entropy: Tensor = total.log() - torch.linalg.vecdot(mass, centred) / total
        return entropy


def entropy_in_pieces(rows: Tensor, vocab_size: int, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Entropies (N,) of the logits (N, V) that `logits_of` makes of rows (N, ...), some rows at a time."""
    most = ENTROPY.rows(vocab_size, rows.device)
    if len(rows) <= most:
        return entropy_from_logits(logits_of(rows))
    return torch.cat([entropy_from_logits(logits_of(piece)) for piece in rows.split(most)])


def in_type(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a type; what is finite stays finite also in half precision, which ends at 65504."""
    if dtype != torch.float16:
        return exact.to(dtype)
    bounded = exact.clamp(-LARGEST_INPUT, LARGEST_INPUT)
    return torch.where(exact.isfinite(), bounded, exact).to(dtype)
