"""What training needs of features, wherever they are kept, and views that show them otherwise.

Shapes: T tokens, V vocabulary, M support.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.columns import joined
from moe_bias.features.extract import Features, chunk_rows, support_columns, token_scalars
from moe_bias.progress import meter
from moe_bias.support import RestScalars, split_vocabulary


class FeatureSource(Protocol):
    """Tokens that can be read by number: in memory (`Features`), or on disk."""

    @property
    def support(self) -> Tensor:
        """The token ids (M,) int64 that `column` and `rest` of the features refer to."""

    @property
    def token(self) -> Tensor:
        """The realised token ids (T,) int64, without a look at the hidden states."""

    @property
    def example(self) -> Tensor:
        """The number of the example that each token is of (T,) int64, without a look at the hidden states."""

    def __len__(self) -> int:
        """How many tokens there are."""

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens, in the given order."""

    def contents(self) -> Iterator[Tensor]:
        """Tensors that tell these hidden states from others: themselves, or their checksums."""


@dataclass(frozen=True)
class Subset:
    """Some tokens of a source as a source of their own: a view, which copies what it is asked for.

    `index` (T,) int64 are their numbers in `source`.
    """

    source: FeatureSource
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def support(self) -> Tensor:
        """The source's, (M,) int64."""
        return self.source.support

    @property
    def token(self) -> Tensor:
        """Realised token ids (T,) int64."""
        return self.source.token[self.index]

    @property
    def example(self) -> Tensor:
        """The source's numbers of the examples, (T,) int64."""
        return self.source.example[self.index]

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens, by their numbers in the view. Raises IndexError on a number outside it."""
        return self.source.at(self.index[index])

    def contents(self) -> Iterator[Tensor]:
        """The numbers, and the source's."""
        return chain([self.index], self.source.contents())


@dataclass(frozen=True)
class AllOf:
    """All tokens of a source in its order, of which a view says something otherwise."""

    source: FeatureSource

    def __len__(self) -> int:
        return len(self.source)

    @property
    def token(self) -> Tensor:
        """Realised token ids (T,) int64."""
        return self.source.token

    @property
    def example(self) -> Tensor:
        """The source's numbers of the examples, (T,) int64."""
        return self.source.example


@dataclass(frozen=True)
class OnSupport(AllOf):
    """A source on another support (M,): `rest` (T,) and `column` (T,) are its own, all else the source's."""

    support: Tensor
    rest: RestScalars
    column: Tensor

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens, by their numbers in the source."""
        rest, column = self.rest.at(index), self.column[index]
        return replace(self.source.at(index), rest=rest, column=column, support=self.support)

    def contents(self) -> Iterator[Tensor]:
        """The source's."""
        return self.source.contents()


def on_support(source: FeatureSource, head: Head, support: Sequence[int], description: str) -> OnSupport:
    """The source on another support; its hidden states go through the output embedding, a chunk at a time."""
    split = split_vocabulary(torch.tensor(support, device=head.device), head.vocab_size)
    size, parts = chunk_rows(head), []
    with meter(description, len(source), "tokens") as bar:
        for start in range(0, len(source), size):
            batch = source.at(slice(start, start + size))
            parts.append(token_scalars(head, batch.hidden.to(head.device), batch.token.to(head.device), split))
            bar.advance(len(batch))
    support_M = torch.tensor(support)
    column_T = support_columns(support_M, head.vocab_size)[source.token]
    return OnSupport(source, support_M, joined(parts).base.rest, column_T)


def on_device(batch: Features, device: torch.device) -> Features:
    """The same features on a device; nothing is copied where they are there already."""
    return batch.to(device)
