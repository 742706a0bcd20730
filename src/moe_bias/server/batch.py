"""Rows that decode together and come and go: one step of the frozen model gives each its next hidden state.

Rows of different lengths stand flush at the end of one cache, with empty places before the shorter ones, which the
mask keeps out; positions count a row's own tokens, so that a row is the same whatever rows are beside it.

Shapes: B rows, L places, D hidden, H key-value heads, K their size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bias.rollout.cache import roomy_cache
from moe_bias.rollout.decoding import hidden_after
from moe_bias.server.prefixes import KeysValues, Prefix, filled_cache, layers_of
from moe_bias.server.together import Rows, Text, pass_together


class Batch:
    """The keys and values of all rows. Rows are known by their place, in the order in which they joined."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cache, self._lengths = roomy_cache(), list[int]()

    def __len__(self) -> int:
        return len(self._lengths)

    @torch.no_grad()
    def join(self, prefix: Prefix) -> None:
        """Adds a row that goes on after the prefix."""
        if not self._lengths:
            self._cache = filled_cache(prefix.layers)
        else:
            pairs = zip(layers_of(self._cache), prefix.layers, strict=True)
            self._cache = filled_cache([_below(held, new) for held, new in pairs])
        self._lengths.append(len(prefix))

    @torch.no_grad()
    def leave(self, place: int) -> tuple[KeysValues, ...]:
        """Takes a row out, and returns its keys and values (1, H, L, K): a copy."""
        length = self._lengths[place]
        layers = layers_of(self._cache)
        row = (slice(place, place + 1), slice(None), slice(-length, None))
        own = tuple((keys[row].clone(), values[row].clone()) for keys, values in layers)
        del self._lengths[place]
        self._cache = roomy_cache()
        if self._lengths:
            stay = [other for other in range(len(self._lengths) + 1) if other != place]
            most = max(self._lengths)
            self._cache = filled_cache([(keys[stay, :, -most:], values[stay, :, -most:]) for keys, values in layers])
        return own

    @torch.no_grad()
    def next(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states (B, D) after the next token of each row."""
        device = next(self._model.parameters()).device
        self._lengths = [length + 1 for length in self._lengths]
        length_B, places = torch.tensor(self._lengths, device=device), max(self._lengths)
        mask_BL = (torch.arange(places, device=device) >= places - length_B[:, None]).long()
        token_B1 = torch.tensor(tokens, device=device)[:, None]
        return hidden_after(self._model, token_B1, mask_BL, length_B[:, None] - 1, self._cache)[:, -1]

    @torch.no_grad()
    def next_beside(self, tokens: Sequence[int], texts: Sequence[Text]) -> tuple[Tensor, list[Prefix]]:
        """As `next`, with some texts read in the same pass; for a model that `can_pass_together`."""
        rows = Rows(layers_of(self._cache), self._lengths)
        hidden_BD, grown, prefixes = pass_together(self._model, rows, tokens, texts)
        for number, (keys, values) in enumerate(grown):
            self._cache.update(keys, values, number)
        self._lengths = [length + 1 for length in self._lengths]
        return hidden_BD, prefixes


def _below(held: KeysValues, new: KeysValues) -> KeysValues:
    """A row's keys and values under those of others, with empty places before whatever is shorter."""
    places = max(held[0].shape[-2], new[0].shape[-2])
    keys, values = (
        torch.cat([F.pad(part, (0, 0, places - part.shape[-2], 0)) for part in parts])
        for parts in zip(held, new, strict=True)
    )
    return keys, values
