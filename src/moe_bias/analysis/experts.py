"""What a trained layer's experts say: the tokens that they move, and the hidden directions that linear ones read.

An expert that is made through the output embedding W has a bias for every token of the vocabulary, W c plus its free
entries, whatever the support that it was trained on. Off a support that it does not reach beyond, that bias is not
applied: it tells which tokens the direction c is near, and what a longer reach would do. Such tokens are marked, and
there are at most half as many of them: nothing was trained there, and rare tokens would crowd out what the expert does.

A linear expert adds W U V n(h), n(h) = (h - mean) / scale. Only the product of its two factors is determined, so
it is shown by the product's singular vectors: reading j adds W u_j s_j (v_j n(h)). The hidden states that
v_j n(h) is large for lean to the tokens whose own rows of W, centred over the vocabulary, align with v_j / scale; of
V tokens one aligns by about sqrt(2 ln V) standard deviations with any direction, so only those beyond that are named.
The sign of the pair (u_j, v_j) is free; it is the one with which the token that is moved most is raised.

Shapes: E experts, D hidden, R rank, N vectors, M support, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moe_bias.layer import MoEBiasLayer

Decode = Callable[[Sequence[int]], str]
"""From token ids to text."""
READINGS = 3
"""Readings shown of an expert, where nobody says how many."""
_NOTHING = 1e-6
"""A singular value this small beside the largest is rounding: the product has no such part."""


@dataclass(frozen=True)
class TokenBias:
    """A token and the bias in nats that it gets. `acts`: whether the adapter applies it, or only points there."""

    id: int
    text: str
    bias: float
    acts: bool = True


@dataclass(frozen=True)
class TokenLean:
    """A token that hidden states lean to, and how far: standard deviations from the vocabulary's mean."""

    id: int
    text: str
    deviations: float


@dataclass(frozen=True)
class Reading:
    """What a linear expert adds per unit that it reads along one hidden direction, and what it reads there.

    Hidden states that lean to `toward` raise `raised` and lower `lowered`; those that lean to `away` do the opposite.
    Either is empty where no token stands out by more than chance. `size` is the singular value.
    """

    size: float
    toward: list[TokenLean]
    away: list[TokenLean]
    raised: list[TokenBias]
    lowered: list[TokenBias]


@dataclass(frozen=True)
class ExpertView:
    """The tokens that one expert raises and lowers most, strongest first, a bias of 0 doing neither; the norm of its
    bias over the tokens that it acts on, None where a record does not say; its readings, strongest first.
    """

    raised: list[TokenBias]
    lowered: list[TokenBias]
    norm: float | None = None
    readings: list[Reading] = field(default_factory=list)


def any_off_support(views: Iterable[ExpertView]) -> bool:
    """Whether a token is among them that the adapter does not act on."""
    tokens = (token for view in views for side in _sides(view) for token in side)
    return not all(token.acts for token in tokens)


def _sides(view: ExpertView) -> Iterator[list[TokenBias]]:
    yield from (view.raised, view.lowered)
    for reading in view.readings:
        yield from (reading.raised, reading.lowered)


def spelled(token: TokenBias | TokenLean) -> str:
    """The token's text in quotes, or its id where there is no text."""
    return repr(token.text) if token.text else str(token.id)


def marked(token: TokenBias) -> str:
    """The token in quotes, in brackets where the adapter does not act on it."""
    return spelled(token) if token.acts else f"({spelled(token)})"


def strongest(tokens: Sequence[TokenBias], count: int) -> list[TokenBias]:
    """Of one side, the strongest first: `count` that the adapter acts on, and up to half as many stronger others."""
    ordered = sorted(tokens, key=lambda token: -abs(token.bias))
    acting = [token for token in ordered if token.acts][:count]
    weakest = abs(acting[-1].bias) if len(acting) == count else 0.0
    others = [token for token in ordered if not token.acts and abs(token.bias) > weakest][: count // 2]
    return [token for token in ordered if token in acting or token in others]


def view_of_record(card: Mapping[str, Any]) -> ExpertView:
    """From `asdict` of one, perhaps among other keys, or from a record of before there were readings."""
    return _VIEWS.validate_python(card)


_VIEWS = TypeAdapter(ExpertView)


@torch.no_grad()
def expert_views(layer: MoEBiasLayer, top: int, decode: Decode, readings: int = READINGS) -> list[ExpertView]:
    """What each expert of a layer says: on each side the `strongest` tokens, and its `readings` strongest readings.

    Experts of free entries alone speak of the support; others of the whole vocabulary, through the output embedding
    that the layer has.
    """
    if layer.directions is None:
        assert layer.experts is not None
        every_M = torch.ones(layer.experts.shape[-1], dtype=torch.bool)
        tokens = _Tokens(layer.support_or_all().tolist(), every_M, top, decode)
        return [tokens.view(bias_M) for bias_M in layer.experts.detach()]
    assert layer.embedding is not None
    rows_VD = layer.embedding(None)
    acts_V = torch.ones(len(rows_VD), dtype=torch.bool)
    if layer.support is not None:
        acts_V[:] = False
        acts_V[layer.support.cpu()] = True
    tokens = _Tokens(range(len(rows_VD)), acts_V, top, decode)
    return [
        replace(
            tokens.view(_bias(layer, rows_VD, number)), readings=_readings(layer, rows_VD, number, tokens, readings)
        )
        for number in range(layer.config.num_experts)
    ]


def chance_level(vocab_size: int) -> float:
    """How many standard deviations the most aligned of so many tokens has with a direction drawn at random."""
    return sqrt(2 * log(vocab_size))


def product_parts(writes_RD: Tensor, reads_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors (N, D), singular values (N,) and right ones (N, D) of `writes.T @ reads`, largest first.

    In float64; parts that are nothing but rounding are left out. The D x D product itself is never made.
    """
    (left_DR, left_RR), (right_DR, right_RR) = (torch.linalg.qr(factor.double().T) for factor in (writes_RD, reads_RD))
    left_RN, size_N, right_NR = torch.linalg.svd(left_RR @ right_RR.T)
    kept = size_N > _NOTHING * size_N[0]
    return (left_DR @ left_RN).T[kept], size_N[kept], (right_NR @ right_DR.T)[kept]


def _bias(layer: MoEBiasLayer, rows_VD: Tensor, number: int) -> Tensor:
    """An expert's constant bias (V,), free entries included."""
    assert layer.directions is not None
    bias_V = rows_VD @ layer.directions[number].to(rows_VD)
    if layer.experts is not None:
        columns = slice(None) if layer.support_ids is None else layer.support_ids.to(bias_V.device)
        bias_V[columns] += layer.experts[number].to(bias_V)
    return bias_V


def _readings(layer: MoEBiasLayer, rows_VD: Tensor, number: int, tokens: _Tokens, count: int) -> list[Reading]:
    if layer.writes is None or layer.reads is None:
        return []
    parts = product_parts(layer.writes[number].detach(), layer.reads[number].detach())
    writes_ND, size_N, reads_ND = (part[:count] for part in parts)
    moves_NV = (size_N[:, None] * writes_ND).to(rows_VD) @ rows_VD.T
    leans_NV = (reads_ND / layer.hidden_scale.double()).to(rows_VD) @ rows_VD.T
    return [tokens.reading(*one) for one in zip(size_N.tolist(), moves_NV, leans_NV, strict=True)]


@dataclass(frozen=True)
class _Tokens:
    """The tokens that a vector's columns stand for, on which of them the adapter acts, and how many to show."""

    ids: Sequence[int]
    acts_V: Tensor
    top: int
    decode: Decode

    def view(self, bias_V: Tensor) -> ExpertView:
        bias_V = bias_V.cpu()
        return ExpertView(*self._moved(bias_V), norm=float(bias_V[self.acts_V].double().norm()))

    def reading(self, size: float, moves_V: Tensor, leans_V: Tensor) -> Reading:
        moves_V, leans_V = moves_V.cpu(), leans_V.cpu()
        sign = 1 if moves_V[moves_V.abs().argmax()] >= 0 else -1
        return Reading(size, *self._leaning(sign * leans_V), *self._moved(sign * moves_V))

    def _moved(self, bias_V: Tensor) -> tuple[list[TokenBias], list[TokenBias]]:
        return self._side(bias_V, 1), self._side(bias_V, -1)

    def _side(self, bias_V: Tensor, sign: int) -> list[TokenBias]:
        found = [
            TokenBias(*self._token(column), sign * size, acts)
            for acts, among_V in ((True, self.acts_V), (False, ~self.acts_V))
            for column, size in self._largest(sign * bias_V, among_V, self.top)
        ]
        return strongest(found, self.top)

    def _leaning(self, lean_V: Tensor) -> tuple[list[TokenLean], list[TokenLean]]:
        centred_V = lean_V - lean_V.mean()
        deviations_V = centred_V / centred_V.std(correction=0).clamp(min=torch.finfo(centred_V.dtype).tiny)
        every_V, chance = torch.ones_like(self.acts_V), chance_level(len(lean_V))
        toward, away = (
            [
                TokenLean(*self._token(column), sign * size)
                for column, size in self._largest(sign * deviations_V, every_V, self.top)
                if size > chance
            ]
            for sign in (1, -1)
        )
        return toward, away

    def _largest(self, values_V: Tensor, among_V: Tensor, count: int) -> list[tuple[int, float]]:
        """Columns and values of the largest that are above 0, largest first."""
        column_N = among_V.nonzero().squeeze(-1)
        top = values_V[column_N].topk(min(count, len(column_N)))
        found = zip(column_N[top.indices].tolist(), top.values.tolist(), strict=True)
        return [(column, value) for column, value in found if value > 0]

    def _token(self, column: int) -> tuple[int, str]:
        token = self.ids[column]
        return token, self.decode([token])
