"""The base's final logits on the support, u_S: kept across epochs where they fit, else computed again.

They do not depend on the layer. Kept, an epoch costs a read of T x M floats in place of a product of
2 T D M operations.

Shapes: T tokens, D hidden, M support.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.chunks import CHUNK_TOKENS
from moe_bias.features.extract import Features
from moe_bias.features.source import FeatureSource

HiddenOf = Callable[[Features], Tensor]


def _own_hidden(batch: Features) -> Tensor:
    return batch.hidden


class BaseLogits:
    """u_S of a source's tokens, float32 on the head's device; `nbytes` are kept of them, which took `seconds`.

    `hidden_of` tells which hidden states of a batch the head reads: the model's own, unless told otherwise.
    """

    def __init__(self, source: FeatureSource, head: Head, budget: int, hidden_of: HiddenOf | None = None) -> None:
        """Keeps them where T x M floats fit into `budget` bytes."""
        self._hidden_of = hidden_of or _own_hidden
        self._columns = head.columns(source.support)
        needed, started = 4 * len(source) * len(source.support), time.perf_counter()
        self._kept_TM = self._all_of(source, head) if needed <= budget else None
        self.nbytes = 0 if self._kept_TM is None else needed
        self.seconds = time.perf_counter() - started

    def of(self, index: Tensor, batch: Features) -> Callable[[slice], Tensor]:
        """The logits (T, M) of any rows of a batch that holds the source's tokens `index`.

        Each call gives a tensor of its own, which may be overwritten.
        """
        kept_TM = self._kept_TM
        if kept_TM is None:
            return lambda rows: self._columns(self._hidden_of(batch)[rows])
        index = index.to(kept_TM.device)
        return lambda rows: kept_TM.index_select(0, index[rows])

    def between(self, start: int, stop: int) -> BaseLogits:
        """Those of the source's tokens from `start` to before `stop`, as a source of their own has them."""
        part = copy.copy(self)
        part._kept_TM = None if self._kept_TM is None else self._kept_TM[start:stop]
        return part

    def _all_of(self, source: FeatureSource, head: Head) -> Tensor:
        kept_TM = torch.empty(len(source), len(source.support), device=head.device)
        for start in range(0, len(source), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            kept_TM[rows] = self._columns(self._hidden_of(source.at(rows)).to(head.device))
        return kept_TM
