"""A layer's weights on their way: one row of float32, or how they follow from those that are there already.

An update that exceeds a bound is halved, or undone, which a worker does by itself when it is told so: the arithmetic
is the same IEEE sum and product wherever it is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moe_bias.layer import MoEBiasLayer

Row = NDArray[np.float32]


def row_of(layer: MoEBiasLayer) -> Row:
    """All of a layer's state, one tensor after the other."""
    return np.concatenate([tensor.detach().cpu().float().numpy().ravel() for tensor in layer.state_dict().values()])


@torch.no_grad()
def put(row: Row, layer: MoEBiasLayer) -> None:
    """Gives a layer of the same config this state."""
    start = 0
    for tensor in layer.state_dict().values():
        part = torch.from_numpy(row[start : start + tensor.numel()]).view_as(tensor)
        tensor.copy_(part)
        start += tensor.numel()


@dataclass(frozen=True)
class Halved:
    """As far from what the last gradient was of as half of what the weights are now."""


@dataclass(frozen=True)
class Undone:
    """What the last gradient was of."""


@dataclass(frozen=True)
class Both:
    """For who has missed something: what the last gradient was of, and the weights now."""

    anchor: Row
    now: Row


Change = Row | Halved | Undone | Both | None


@dataclass
class Weights:
    """The weights now, and the anchor, those that the last gradient was of; alike where the calls were the same."""

    anchor: Row
    now: Row
    version: int = 0

    def change_to(self, row: Row) -> Change:
        """What to tell of weights, None where they are the same; they are the weights now from then on."""
        change: Change = row
        if np.array_equal(row, self.now):
            return None
        if np.array_equal(row, self.anchor):
            change = Undone()
        elif np.array_equal(row, _half(self.now, self.anchor)):
            change = Halved()
        self.apply(change)
        return change

    def apply(self, change: Change) -> None:
        """Does what one was told."""
        if change is None:
            return
        if isinstance(change, Both):
            self.anchor, self.now = change.anchor, change.now
        elif isinstance(change, Undone):
            self.now = self.anchor
        else:
            self.now = _half(self.now, self.anchor) if isinstance(change, Halved) else change
        self.version += 1

    def hold(self) -> None:
        """A gradient is taken of the weights now."""
        self.anchor = self.now


def _half(now: Row, anchor: Row) -> Row:
    return (now + anchor) / np.float32(2)
