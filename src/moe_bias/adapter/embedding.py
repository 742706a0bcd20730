"""Which output embedding an adapter was made on: a few of its entries, kept in the adapter's config.

An adapter says something only about the model that it was trained on. Sizes alone do not tell models apart, nor a
model from a quantised copy, on which experts that are made through the output embedding are others.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_bias.layer import EmbeddingRows
from moe_bias.mistakes import UserError

SAMPLED_TOKENS, SAMPLED_ENTRIES = 16, 4
ROUNDING = 2.0**-7
"""Half precision moves an entry by at most this much, relative to the largest of the sample."""
ANOTHER = 0.5
"""Entries that differ by this much, relative to the sample's root mean square, are of another embedding."""


def embedding_sample(rows: EmbeddingRows, hidden_size: int, vocab_size: int) -> Tensor | None:
    """Some entries of an output embedding, float32 on the CPU; None where its weights are not there yet."""
    token_M = _evenly(SAMPLED_TOKENS, vocab_size)
    sample_MD = rows(token_M)
    if sample_MD.is_meta:
        return None
    return sample_MD[:, _evenly(SAMPLED_ENTRIES, hidden_size).to(sample_MD.device)].float().cpu().flatten()


def check_embedding(made_on: Sequence[float], found: Tensor, made_through: bool) -> None:
    """Raises ValueError where the entries are of another embedding; warns where they differ by more than rounding.

    `made_through`: whether the adapter's experts are made through the embedding, and so differ with it.
    """
    expected = torch.tensor(made_on)
    if expected.shape != found.shape:
        raise UserError(f"embedding_sample has {len(expected)} entries, this model's has {len(found)}")
    difference, scale = float((found - expected).abs().max()), float(expected.square().mean().sqrt())
    if difference > ANOTHER * scale:
        raise UserError(
            f"this adapter was made on another output embedding: entries differ by up to {difference:.3g}, where "
            f"{scale:.3g} is usual; load the model that it was trained on"
        )
    if made_through and difference > ROUNDING * float(expected.abs().max()):
        warnings.warn(
            f"this adapter's experts are made through the output embedding, whose entries differ by up to "
            f"{difference:.3g} from those it was trained on ({scale:.3g} is usual): the model may be a quantised copy",
            stacklevel=2,
        )


def _evenly(count: int, size: int) -> Tensor:
    count = min(count, size)
    return torch.arange(count) * size // count
