"""The processes that train one layer together: each takes a part of every batch, and gradients are summed.

`accelerate` finds out which they are and talks between them; alone, everything here does nothing.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_bias.mistakes import UserError

if TYPE_CHECKING:
    from accelerate import PartialState


PATIENCE = timedelta(days=7)
"""How long a process waits for another: the first one may run a model over a whole corpus meanwhile."""


class Processes:
    """One process among `count`, with its `rank`; the first one, rank 0, writes files and talks."""

    def __init__(self, state: PartialState | None = None) -> None:
        self._state = state
        self.count = 1 if state is None else int(state.num_processes)
        self.rank = 0 if state is None else int(state.process_index)

    @classmethod
    def join(cls, device: str) -> Processes:
        """The processes that a launcher such as torchrun started; this one alone without a launcher.

        Raises UserError where fewer come together than were started: each would train alone, over
        the others' files.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started < 2:
            return ALONE
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        joined = cls(PartialState(cpu=on_cpu, timeout=PATIENCE))
        if joined.count != started:
            raise UserError(f"{started} processes were started, but accelerate joins {joined.count}; use torchrun")
        return joined

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and talks."""
        return self.rank == 0

    def part(self, index: Tensor) -> Tensor:
        """The part of a batch that is for this process, perhaps empty; the parts together are the batch."""
        return index.tensor_split(self.count)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same bits in each."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        summed: Tensor = reduce(tensor, reduction="sum")
        return summed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all of them act alike."""
        if self._state is None:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self._state.device)))

    def total_gradients(self, module: nn.Module) -> None:
        """Replaces each gradient by its sum over the processes; all of them travel as one tensor."""
        if self._state is None:
            return
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        summed = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def of_first(self, text: str) -> str:
        """The first process's text, in all of them."""
        if self._state is None:
            return text
        from accelerate.utils import broadcast_object_list

        said = [text]
        broadcast_object_list(said)
        return said[0]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()


def is_beside_the_first() -> bool:
    """Whether a launcher started this process beside the first one, which speaks and writes for all; asked before
    they join.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


ALONE = Processes()
