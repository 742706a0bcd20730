"""Rows that decode and texts that are read, in one pass of the frozen model.

A pass over a few tokens takes as long as its weights take to come from memory, so that a text that is read between two
tokens of the answers makes all of them wait for as long as a token takes. Here its tokens go through the model beside
the rows' own: all tokens stand in one row, and a mask keeps each to its own text.

Shapes: B rows, N new tokens, H heads of keys and values, L places held, K their size, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_bias.rollout.decoding import hidden_after
from moe_bias.server.prefixes import KeysValues, Prefix, extended, filled_cache, layers_of

MOST_TOKENS = 64
"""New tokens of a text that go beside others at most: more cost what they cost alone."""
_NOBODY = -1


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
    device = next(model.parameters()).device
    token_1N = torch.tensor([[*tokens, *(token for text in texts for token in text.new)]], device=device)
    position_N = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    owner_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    mask_NL = _mask(rows, texts, owner_N, position_N)
    dtype = next(model.parameters()).dtype
    additive_NL = torch.zeros(mask_NL.shape, dtype=dtype).masked_fill(~mask_NL, torch.finfo(dtype).min)
    cache = filled_cache([_side_by_side(rows, texts, number) for number in range(len(rows.layers))])
    additive = additive_NL[None, None].to(device)
    hidden_ND = hidden_after(model, token_1N, additive, position_N[None].to(device), cache)[0]
    new = [(keys[..., -len(owner_N) :, :], values[..., -len(owner_N) :, :]) for keys, values in layers_of(cache)]
    of_rows, *of_texts = _split(new, [len(tokens), *counts[len(tokens) :]])
    hidden_BD, *hidden_texts = hidden_ND.split([len(tokens), *counts[len(tokens) :]])
    grown = tuple((keys.transpose(0, 2), values.transpose(0, 2)) for keys, values in of_rows)
    return hidden_BD, grown, [_joined(*each) for each in zip(texts, hidden_texts, of_texts, strict=True)]


def can_pass_together(model: nn.Module) -> bool:
    """Whether a pass over tokens of several texts gives what a pass over each gives.

    Not where a layer sees only the last tokens, where positions are told by the mask, or where states go from token to
    token beside keys and values.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
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


def _mask(rows: Rows, texts: Sequence[Text], owner_N: Tensor, position_N: Tensor) -> Tensor:
    """(N, places held and N) bool: a token sees what is its text's own and not after it."""
    places = rows.layers[0][0].shape[-2]
    owners = [torch.full((places,), _NOBODY) for _ in rows.lengths]
    for number, length in enumerate(rows.lengths):
        owners[number][places - length :] = number
    for number, text in enumerate(texts, len(owners)):
        owners.append(torch.full((len(text.tokens) - len(text.new),), number))
    held_L = torch.cat(owners)
    owner_L = torch.cat([held_L, owner_N])
    position_L = torch.cat([torch.full_like(held_L, -1), position_N])
    return (owner_N[:, None] == owner_L) & (position_L <= position_N[:, None])


def _side_by_side(rows: Rows, texts: Sequence[Text], layer: int) -> KeysValues:
    """What a layer holds of all rows and texts, as of one row (1, H, places, K)."""
    keys, values = (
        torch.cat(
            [
                rows.layers[layer][part].transpose(0, 1).flatten(1, 2)[None],
                *(text.known.layers[layer][part] for text in texts if text.known is not None),
            ],
            dim=-2,
        )
        for part in (0, 1)
    )
    return keys, values


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
