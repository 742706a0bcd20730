"""Which tokens make up each step: random batches of whole units, and the seeds of what is drawn.

Batches are of tokens, not of sequences, where an objective's unit is a token: a hidden state holds all the context
that the layer sees. Else they are of whole answers or pairs, as many in each as have the batch's tokens on average.

Shapes: T tokens, N units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_bias.mistakes import UserError
from moe_bias.training.objectives import Unit, check_pairs


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass(frozen=True)
class Units:
    """The tokens of a source as units of an objective.

    `order` (T,) int64: token numbers, those of a unit side by side; `starts` (N + 1,) int64: where each unit begins in
    it. Both None where each token is one.
    """

    count: int
    order: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def of(cls, example_T: Tensor, unit: Unit) -> Units:
        """Units of tokens of these examples. Raises UserError on an answer without the other one of its pair."""
        if unit == "token":
            return cls(len(example_T))
        if unit == "pair":
            check_pairs(example_T.unique())
        number_T = example_T // 2 if unit == "pair" else example_T
        order = number_T.argsort(stable=True)
        counts = number_T[order].unique_consecutive(return_counts=True)[1]
        return cls(len(counts), order, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def in_a_batch(self, batch_tokens: int) -> int:
        """How many units have so many tokens on average; at least one."""
        if self.order is None:
            return batch_tokens
        return max(round(batch_tokens * self.count / max(len(self.order), 1)), 1)

    def tokens_of(self, unit_N: Tensor) -> Tensor:
        """The token numbers of some units, one unit after the other."""
        if self.order is None or self.starts is None:
            return unit_N
        bounds = zip(self.starts[unit_N].tolist(), self.starts[unit_N + 1].tolist(), strict=True)
        return torch.cat([self.order[:0], *(self.order[start:end] for start, end in bounds)])


def batches(units: int, in_a_batch: int, epochs: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Numbers of the units of each batch from step `first_step` on: every epoch all of them in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-units // in_a_batch)
    for epoch in range(epochs):
        # Orders of epochs that are over are drawn too: they are what the generator's state consists of.
        order = torch.randperm(units, generator=generator)
        yield from order.split(in_a_batch)[max(first_step - epoch * steps_per_epoch, 0) :]


def whole_units(example_T: Tensor, count: int, unit: Unit) -> int:
    """How many of the first `count` tokens are of whole units, in a source whose units stand one after the other.

    Raises UserError where none is whole.
    """
    if unit == "token" or count >= len(example_T):
        return min(count, len(example_T))
    number_T = example_T // 2 if unit == "pair" else example_T
    whole = int((number_T[:count] != number_T[count]).sum())
    if not whole:
        raise UserError(f"`train_tokens` = {count:,} holds no whole {unit}; the first has more tokens")
    return whole
