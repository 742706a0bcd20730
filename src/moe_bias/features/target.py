"""What a target model says of a draft model's tokens: its hidden states, and the scalars of both distributions.

Hidden states of both models come from stores of the same examples. What is not in either store depends on both
distributions at once (see `divergence`), and is taken in one pass of the two output embeddings, without backbones.

Shapes: T tokens, D hidden size of the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.columns import Columns, joined
from moe_bias.divergence import TargetScalars, in_common, target_scalars
from moe_bias.features.extract import Features, chunk_rows
from moe_bias.features.source import AllOf, FeatureSource
from moe_bias.progress import meter


@dataclass(frozen=True)
class TargetTokens(Columns):
    """Of each of a draft's tokens: the target's hidden state (T, D), and scalars on the draft's support (T,)."""

    hidden: Tensor
    scalars: TargetScalars


@dataclass(frozen=True)
class WithTarget(AllOf):
    """A draft's tokens with what the target says of them: `target` holds the same tokens in the same order."""

    target: FeatureSource
    scalars: TargetScalars

    @property
    def support(self) -> Tensor:
        """The draft's, (M,) int64."""
        return self.source.support

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens, by their numbers in the source."""
        tokens = TargetTokens(self.target.at(index).hidden, self.scalars.at(index))
        return replace(self.source.at(index), target=tokens)

    def contents(self) -> Iterator[Tensor]:
        """Those of both models."""
        return chain(self.source.contents(), self.target.contents())


def with_target(
    source: FeatureSource, target: FeatureSource, head: Head, target_head: Head, description: str
) -> WithTarget:
    """Adds the target's tokens to a draft's, whose `head` it is; the progress bar says `description`.

    The two sources hold the same tokens in the same order.
    """
    assert torch.equal(source.token, target.token)
    support_M, parts = source.support.to(head.device), []
    size = min(chunk_rows(head), chunk_rows(target_head))
    with meter(description, len(source), "tokens") as bar:
        for start in range(0, len(source), size):
            rows = slice(start, start + size)
            logits_CV = _logits(head, source.at(rows).hidden)
            target_CV = in_common(_logits(target_head, target.at(rows).hidden).to(head.device), head.vocab_size)
            parts.append(target_scalars(target_CV, logits_CV, support_M).to("cpu"))
            bar.advance(len(logits_CV))
    return WithTarget(source, target, joined(parts))


def target_of(batch: Features) -> TargetTokens:
    """What the target says of a batch, which has one."""
    assert batch.target is not None
    return batch.target


def _logits(head: Head, hidden_CD: Tensor) -> Tensor:
    return head.logits(hidden_CD.to(head.device, head.dtype))
