"""Answers that feedback may still come to: the last ones, in memory, bounded by count, bytes and age.

An answer that is gone can be taught no more; nothing that was acknowledged depends on it.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from moe_bias.config import SpoolLimits
from moe_bias.mistakes import UserError, shown

_NUMBER_BYTES = 36
"""A token id in a list of Python's."""


@dataclass(frozen=True, eq=False)
class ServedAnswer:
    """An answer under one adapter: `prompt` and `tokens` are ids, end token included, `hidden` (T, D) are what it was
    chosen from, on the CPU. `finished`: it ended by itself.
    """

    id: str
    adapter: str
    prompt: list[int]
    tokens: list[int]
    hidden: Tensor
    finished: bool

    @property
    def nbytes(self) -> int:
        """What it takes in memory, about."""
        return self.hidden.nbytes + _NUMBER_BYTES * (len(self.prompt) + len(self.tokens))


class Spool:
    """The answers, by their ids; may be used from several threads."""

    def __init__(self, limits: SpoolLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._kept: OrderedDict[str, tuple[float, ServedAnswer]] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    def keep(self, answer: ServedAnswer) -> None:
        """Adds an answer; the oldest make room."""
        with self._lock:
            self._kept[answer.id] = self._clock(), answer
            self._bytes += answer.nbytes
            self._drop_old()

    def get(self, identity: object) -> ServedAnswer:
        """The answer of an id. Raises UserError where it is none, or has gone."""
        with self._lock:
            self._drop_old()
            found = self._kept.get(identity) if isinstance(identity, str) else None
        if found is None:
            raise UserError(
                f"there is no answer {shown(identity)} to be taught: those under one adapter are kept, {self._limits}"
            )
        return found[1]

    @property
    def nbytes(self) -> int:
        """Memory that the answers take."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._kept)

    def _drop_old(self) -> None:
        oldest = self._clock() - self._limits.seconds
        while self._kept:
            kept_at, answer = next(iter(self._kept.values()))
            if kept_at >= oldest and self._bytes <= self._limits.bytes and len(self._kept) <= self._limits.count:
                return
            del self._kept[answer.id]
            self._bytes -= answer.nbytes
