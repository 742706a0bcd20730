"""Rows that decode and texts that are read, in one pass of the frozen model.

A pass over a few tokens takes as long as its weights take to come from memory, so that a text that is read between two
tokens of the answers makes all of them wait for as long as a token takes. Here its tokens go through the model beside
the rows' own: all tokens stand in one row, and a mask keeps each to its own text.

Shapes: B rows, N new tokens, H heads of keys and values, L tokens held by all, K their size, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from moe_bias.rollout.decoding import hidden_after
from moe_bias.server.prefixes import KeysValues, Prefix, extended

MOST_TOKENS = 64
"""New tokens of a text that go beside others at most: more cost what they cost alone."""


@dataclass(frozen=True)
class Text:
    """A text whose first tokens are known, if any; all of `tokens` are wanted, and some are new."""

    known: Prefix | None
    tokens: tuple[int, ...]

    @property
    def new(self) -> tuple[int, ...]:
        """The tokens that go through the model."""
        return self.tokens[0 if self.known is None else len(self.known) :]


@dataclass(frozen=True, eq=False)
class Reading:
    """A text that somebody wants read: `finish` is called with all of it, or `failed`, on the engine's thread."""

    tokens: tuple[int, ...]
    finish: Callable[[Prefix], None]
    failed: Callable[[BaseException], None]


@dataclass(frozen=True)
class Rows:
    """Rows that decode: keys and values of each layer (B, H, L, K), flush at the end, and how many are a row's own."""

    layers: tuple[KeysValues, ...]
    lengths: Sequence[int]


@torch.no_grad()
def pass_together(
    model: nn.Module, rows: Rows, tokens: Sequence[int], texts: Sequence[Text]
) -> tuple[Tensor, tuple[KeysValues, ...], list[Prefix]]:
    """Hidden states (B, D) after the next token of each row, their keys and values (B, H, 1, K), and the whole texts.

    At least one row. Only for a model that `can_pass_together`.
    """
    counts = [1] * len(tokens) + [len(text.new) for text in texts]
    starts = [*rows.lengths, *(len(text.tokens) - len(text.new) for text in texts)]
    parameter = next(model.parameters())
    token_1N = torch.tensor([[*tokens, *(token for text in texts for token in text.new)]], device=parameter.device)
    position_N = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    mask_NL = torch.zeros(len(position_N), sum(starts) + len(position_N), dtype=parameter.dtype)
    mask_NL.masked_fill_(~_own(starts, counts, position_N), torch.finfo(parameter.dtype).min)
    beside = [_Beside(_held(rows, texts, number)) for number in range(len(rows.layers))]
    mask, positions = mask_NL[None, None].to(parameter.device), position_N[None].to(parameter.device)
    hidden_ND = hidden_after(model, token_1N, mask, positions, Cache(layers=beside))[0]
    parts = [len(tokens), *counts[len(tokens) :]]
    of_rows, *of_texts = _split([layer.new for layer in beside], parts)
    hidden_BD, *hidden_texts = hidden_ND.split(parts)
    grown = tuple((keys.transpose(0, 2), values.transpose(0, 2)) for keys, values in of_rows)
    return hidden_BD, grown, [_joined(*each) for each in zip(texts, hidden_texts, of_texts, strict=True)]


class _Beside(DynamicLayer):
    """What a layer holds of all rows and texts, as of one row, and the new tokens' after it."""

    def __init__(self, held: Sequence[KeysValues]) -> None:
        super().__init__()
        self._held = held

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens; the new ones' stay in `new`."""
        self.new = key_states, value_states
        keys, values = (
            torch.cat([*held, self.new[part]], -2) for part, held in enumerate(zip(*self._held, strict=True))
        )
        return keys, values


def can_pass_together(model: nn.Module) -> bool:
    """Whether a pass over tokens of several texts gives what a pass over each gives.

    Not where a layer sees only the last tokens, where positions are told by the mask, or where states go from token to
    token beside keys and values.
    """
    whole: Any = model.config
    config = whole.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in kinds):
        return False
    try:
        one, other = extended(model, None, [0, 1, 2]), extended(model, None, [2])
        rows = Rows(one.first(2).layers, [2])
        hidden_BD, _, (text,) = pass_together(model, rows, [2], [Text(other, (2, 1, 0))])
    except Exception:  # of the model's own code, which takes no such mask: each pass is then over one text
        return False
    found_LD = torch.cat([hidden_BD, text.hidden]).float()
    expected_LD = torch.cat([one.hidden[-1:], extended(model, None, [2, 1, 0]).hidden]).float()
    return float((found_LD - expected_LD).norm() / expected_LD.norm()) < 0.05  # bfloat16 rounds by less


def _own(starts: Sequence[int], counts: Sequence[int], position_N: Tensor) -> Tensor:
    """(N, L and N) bool: a token sees what is its text's own and not after it."""
    owners = torch.arange(len(counts))
    held_L, owner_N = owners.repeat_interleave(torch.tensor(starts)), owners.repeat_interleave(torch.tensor(counts))
    owner, position = torch.cat([held_L, owner_N]), torch.cat([torch.full_like(held_L, -1), position_N])
    return (owner_N[:, None] == owner) & (position <= position_N[:, None])


def _held(rows: Rows, texts: Sequence[Text], layer: int) -> list[KeysValues]:
    """What a layer holds of each row, without its empty places, and of each text: (1, H, places, K)."""
    keys, values = rows.layers[layer]
    own = [(slice(row, row + 1), slice(None), slice(-length, None)) for row, length in enumerate(rows.lengths)]
    known = [text.known.layers[layer] for text in texts if text.known is not None]
    return [*((keys[place], values[place]) for place in own), *known]


def _split(layers: Sequence[KeysValues], counts: Sequence[int]) -> list[list[KeysValues]]:
    parts = [(keys.split(counts, -2), values.split(counts, -2)) for keys, values in layers]
    return [[(keys[number], values[number]) for keys, values in parts] for number in range(len(counts))]


def _joined(text: Text, hidden_ND: Tensor, layers: Sequence[KeysValues]) -> Prefix:
    if text.known is None:
        copied = tuple((keys.clone(), values.clone()) for keys, values in layers)
        return Prefix(text.tokens, hidden_ND.clone(), copied)
    whole = tuple(
        (torch.cat([held[0], new[0]], -2), torch.cat([held[1], new[1]], -2))
        for held, new in zip(text.known.layers, layers, strict=True)
    )
    return Prefix(text.tokens, torch.cat([text.known.hidden, hidden_ND]), whole)
