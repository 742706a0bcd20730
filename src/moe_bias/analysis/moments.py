"""Tokens worth a look, in their context: the few of largest score, kept while a text streams by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.analysis.readings import TokenReadings
from moe_bias.features.extract import Features

CONTEXT_TOKENS = 24


@dataclass(frozen=True)
class Moment:
    """One token of a text with what was read of it. `context` are up to CONTEXT_TOKENS tokens of its answer before it.

    `number` is the token's place in the text, `example` the row of its answer, `position` its place
    there; entropies and `kl` in nats.
    """

    score: float
    number: int
    example: int
    position: int
    context: tuple[int, ...]
    token: int
    base_choice: int
    adapted_choice: int
    base_entropy: float
    adapted_entropy: float
    kl: float
    weight: float
    experts: tuple[int, ...]
    gates: tuple[float, ...]


@dataclass(frozen=True)
class Strongest:
    """The `size` moments of largest score, the earlier of equal ones first, from parts in the order of the text."""

    size: int
    moments: tuple[Moment, ...] = ()

    def with_more(self, moments: Sequence[Moment]) -> Strongest:
        """The strongest of these and of the moments kept so far."""
        ranked = sorted((*self.moments, *moments), key=lambda moment: (-moment.score, moment.number))
        return Strongest(self.size, tuple(ranked[: self.size]))

    def candidates(self, score_T: Tensor) -> list[int]:
        """The rows that may be among the strongest: at most `size`, and of a later part than all moments kept.

        A score of -inf is no candidate.
        """
        top = score_T.sort(descending=True, stable=True)
        floor = self.moments[-1].score if self.size and len(self.moments) == self.size else -torch.inf
        return top.indices[: self.size][top.values[: self.size] > floor].tolist()


def moment_at(part: Features, place: int, readings: TokenReadings, row: int, score: float, number: int = 0) -> Moment:
    """The part's token `place`, which is the token `row` of the readings and the token `number` of the text."""
    before = slice(max(place - CONTEXT_TOKENS, 0), place)
    context_C = part.token[before][part.example[before] == part.example[place]]
    return Moment(
        score=score,
        number=number,
        example=int(part.example[place]),
        position=int(part.position[place]),
        context=tuple(context_C.tolist()),
        token=int(part.token[place]),
        base_choice=int(readings.base_choice[row]),
        adapted_choice=int(readings.adapted_choice[row]),
        base_entropy=float(readings.base_entropy[row]),
        adapted_entropy=float(readings.adapted_entropy[row]),
        kl=float(readings.kl[row]),
        weight=float(readings.weight[row]),
        experts=tuple(readings.experts[row].tolist()),
        gates=tuple(readings.gates[row].tolist()),
    )
