"""Several layers at one output embedding: their biases add.

    z' = z + sum_i s_i b_i

Each layer routes the same hidden state by its own router and is gated by the same entropy, that of the base, so
no layer sees what another adds and their order is of no account. A soft-cap bounds the sum, not its parts.

Shapes: B rows (any leading shape where a docstring says `...`), D hidden, V vocabulary, M support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_bias.backbone import HeadTransform, moved_logits
from moe_bias.layer import MoEBiasLayer

Part = tuple[MoEBiasLayer, float]
"""A layer and the strength that it is applied with, in the place of its own."""


@dataclass(frozen=True)
class Move:
    """What is added to final logits: `amount` (..., M) on the tokens of `support` (M,), of all V for None."""

    amount: Tensor
    support: Tensor | None


def summed_move(parts: Sequence[Part], hidden: Tensor, entropy: Tensor) -> Move:
    """The sum of the layers' moves for hidden states (..., D) and base entropies (...,) in nats; at least one layer.

    Several layers meet on the vocabulary, whatever their supports.
    """
    (first, strength), *others = parts
    amount = strength * first(hidden, entropy).bias
    if not others:
        return Move(amount, first.support)
    total = first.on_vocabulary(amount)
    for layer, strength in others:
        total = total + layer.on_vocabulary(strength * layer(hidden, entropy).bias)
    return Move(total, None)


def summed_logits(
    parts: Sequence[Part], transform: HeadTransform, hidden: Tensor, entropy: Tensor, logits: Tensor
) -> Tensor:
    """Final logits (..., V) under all the layers, from the base's final logits and their entropy in nats.

    With one layer at its own strength these are those of `backbone.adapted_logits`, with none the base's.
    """
    if not parts:
        return logits
    move = summed_move(parts, hidden, entropy)
    return moved_logits(transform, logits, move.amount, move.support)
