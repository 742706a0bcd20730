"""The table P of a layer: what its experts are made through, and how long it is kept.

Shapes: C coefficients, D hidden size, M tokens that the layer acts on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class EmbeddingRows(Protocol):
    """The output embedding that a layer's experts are made through."""

    def __call__(self, token_M: Tensor | None) -> Tensor:
        """The weight's rows of some tokens (M, D), of all tokens for None; in float32 or better, without gradient."""

    def state(self) -> tuple[object, ...]:
        """Equal as long as the rows are the same."""


class Kept:
    """What a layer derives and keeps; a copy of the layer derives its own."""

    def __init__(self) -> None:
        self.table: Tensor | None = None
        self.rows: Tensor | None = None
        self.rows_state: tuple[object, ...] = ()
        self._table_state: tuple[object, ...] = ()
        self._made_of: list[Tensor] = []
        self.checked_state: tuple[object, ...] = ()

    def table_of(self, state: tuple[object, ...], trained: list[nn.Parameter], make: Callable[[], Tensor]) -> Tensor:
        """The table of this state and of these contents of what is being trained.

        Fused optimisers write to parameters without a trace in their version, so contents are compared.
        """
        kept = self.table
        same = len(trained) == len(self._made_of) and self._table_state == state
        if kept is None or not (same and all(map(torch.equal, trained, self._made_of))):
            with torch.inference_mode(False), torch.no_grad():
                kept, self._made_of = make(), [part.clone() for part in trained]
            self.table, self._table_state = kept, state
        return kept

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()


def state_of(tensor: Tensor) -> tuple[object, ...]:
    """Changes when the tensor is another, or is written to; tensors made in inference mode do not count that."""
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device
