"""How much is worked on at once, by kind of work and of device: memory then grows with neither tokens nor vocabulary.

The last bits of a result may depend on these numbers, through the order in which a library sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch

CHUNK_TOKENS = 2048
"""Hidden states whose logits on a support are computed at once."""


@dataclass(frozen=True)
class AtOnce:
    """Entries of a matrix with a row for each token that are worked on at once, on a CPU and on any other device."""

    cpu: int
    gpu: int

    def rows(self, width: int, device: torch.device) -> int:
        """Rows of `width` entries, at least one."""
        return max((self.cpu if device.type == "cpu" else self.gpu) // width, 1)


LOGITS = AtOnce(cpu=2**23, gpu=2**27)
"""Full-vocabulary logits that are made of hidden states and held."""
PACKED_LOGITS = AtOnce(cpu=2**24, gpu=2**24)
"""The same of a packed output embedding, of which only some are wanted."""
PIECE = AtOnce(cpu=2**18, gpu=2**26)
"""Logits with temporaries of their size: 1 MiB on a CPU, whose cache keeps them; larger ones cost twice the time."""
ENTROPY = AtOnce(cpu=2**18, gpu=2**24)
"""The same where a model's whole logits are in memory besides."""
READINGS = AtOnce(cpu=2**20, gpu=2**26)
"""Tokens x support that an analysis reads."""
UPDATE = AtOnce(cpu=3 * 2**21, gpu=2**26)
"""Tokens x support that a gradient is taken of.

On a CPU 24 MiB: the C library maps what takes 32 MiB or more anew each time, and its page faults cost a large
batch a third of its time.
"""


def longest_first(sequences: Sequence[Sized], batch_size: int) -> list[list[int]]:
    """Numbers of the sequences in batches of like length: little padding, and memory is soon seen to fit."""
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def even_slices(tokens: int, most: int) -> list[slice]:
    """Slices of at most `most` tokens, even, because a short last slice reads all columns for a few tokens.

    At least one, so that a process without a token in a small batch takes part with zeros.
    """
    count = max(math.ceil(tokens / most), 1)
    rows = max(math.ceil(tokens / count), 1)
    return [slice(start, start + rows) for start in range(0, max(tokens, 1), rows)]
