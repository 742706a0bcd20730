"""What training needs of features, wherever they are kept.

Shapes: T tokens, M support.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from moe_bias.features.extract import Features
from moe_bias.support import RestScalars


class FeatureSource(Protocol):
    """Tokens that can be read by number: in memory (`Features`), or on disk."""

    @property
    def support(self) -> Tensor:
        """The token ids (M,) int64 that `column` and `rest` of the features refer to."""

    @property
    def token(self) -> Tensor:
        """The realised token ids (T,) int64, without a look at the hidden states."""

    def __len__(self) -> int:
        """How many tokens there are."""

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens, in the given order."""


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

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens, by their numbers in the view. Raises IndexError on a number outside it."""
        return self.source.at(self.index[index])


def on_device(batch: Features, device: torch.device) -> Features:
    """The same features on a device; nothing is copied where they are there already."""
    rest = RestScalars(batch.rest.log_sum_exp.to(device), batch.rest.mean_logit.to(device))
    names = ("hidden", "token", "example", "position", "logit", "entropy", "log_partition", "column", "support")
    return replace(batch, rest=rest, **{name: getattr(batch, name).to(device) for name in names})
