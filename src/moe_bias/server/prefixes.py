"""What the frozen model has computed of token sequences, kept so that what begins alike is computed once.

Keys, values and hidden states depend on the tokens alone, never on an adapter or its strength, so one copy
serves the plain model and all adapters; and a conversation goes on from where any of its answers left it.

Shapes: L tokens, N new ones, D hidden, H key-value heads, K their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moe_bias.learning.lessons import shared
from moe_bias.rollout.cache import roomy_cache
from moe_bias.rollout.decoding import hidden_after

PIECE = 512
"""Tokens that go through the model at once, which bounds the memory that a long prompt takes on its way."""

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """Some tokens with their hidden states (L, D), which the output embedding reads after each, and each layer's keys
    and values (1, H, L, K), all as the model has them.
    """

    tokens: tuple[int, ...]
    hidden: Tensor
    layers: tuple[KeysValues, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of hidden states, keys and values."""
        return self.hidden.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def begins_with(self, other: Prefix) -> bool:
        """Whether the other one's tokens are the first of these."""
        return self.tokens[: len(other)] == other.tokens

    def first(self, count: int) -> Prefix:
        """The first tokens alone: a view."""
        layers = tuple((keys[..., :count, :], values[..., :count, :]) for keys, values in self.layers)
        return Prefix(self.tokens[:count], self.hidden[:count], layers)


class Prefixes:
    """Prefixes within a budget of bytes; those go first that were not used for the longest time."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held: list[Prefix] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(prefix.nbytes for prefix in self._held)

    def longest(self, tokens: Sequence[int]) -> Prefix | None:
        """The longest beginning of the tokens that is held, or None. It counts as used."""
        counts = [shared(prefix.tokens, tokens) for prefix in self._held]
        count = max(counts, default=0)
        if count == 0:
            return None
        found = self._held.pop(counts.index(count))
        self._held.append(found)
        return found if count == len(found) else found.first(count)

    def add(self, prefix: Prefix) -> None:
        """Holds it in place of its own beginnings, unless one that is held begins with it, or it exceeds the budget."""
        if prefix.nbytes > self._budget or any(held.begins_with(prefix) for held in self._held):
            return
        self._held = [held for held in self._held if not prefix.begins_with(held)]
        self._held.append(prefix)
        excess = self.nbytes - self._budget
        while excess > 0:
            excess -= self._held.pop(0).nbytes


@torch.no_grad()
def extended(model: nn.Module, known: Prefix | None, tokens: Sequence[int]) -> Prefix:
    """All of `tokens`, which begin with those known; only the others go through the model."""
    device = next(model.parameters()).device
    done = 0 if known is None else len(known)
    assert list(tokens[:done]) == list(known.tokens if known is not None else ())
    cache = roomy_cache() if known is None else filled_cache(known.layers)
    hidden = [] if known is None else [known.hidden]
    for start in range(done, len(tokens), PIECE):
        piece = torch.tensor([tokens[start : start + PIECE]], device=device)
        end = start + piece.shape[-1]
        mask, positions = torch.ones(1, end, dtype=torch.int64, device=device), torch.arange(start, end, device=device)
        hidden.append(hidden_after(model, piece, mask, positions[None], cache)[0])
    return Prefix(tuple(tokens), torch.cat(hidden), layers_of(cache))


def filled_cache(layers: Sequence[KeysValues]) -> Cache:
    """A cache of its own with these keys and values, (B, H, L, K) each."""
    cache = roomy_cache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def layers_of(cache: Cache) -> tuple[KeysValues, ...]:
    """Keys and values of each layer; views of what the cache holds now."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)
