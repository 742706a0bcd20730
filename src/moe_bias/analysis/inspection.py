"""What both models made of one prompt, token by token, as a record holds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from moe_bias.mistakes import UserError


@dataclass(frozen=True)
class InspectedToken:
    """A token of an answer, and what both models had to say where it was written.

    `entropy` (the base's), `adapted_entropy` and `kl` (exact, adapted to base) in nats; `base` and `adapted` are the
    likeliest tokens with their probabilities, `experts` those routed to with their shares, largest first;
    `weight` is the gate's w, `bias` the largest |b| over the support; `flip`: the likeliest token is another one.
    """

    text: str
    id: int
    entropy: float
    adapted_entropy: float
    base: list[tuple[str, float]]
    adapted: list[tuple[str, float]]
    experts: list[tuple[int, float]]
    weight: float
    kl: float
    bias: float
    flip: bool


@dataclass(frozen=True)
class InspectedAnswer:
    """An answer, and whether its end came before the token limit."""

    name: str
    finished: bool
    tokens: list[InspectedToken]


@dataclass(frozen=True)
class Inspection:
    """Answers to one prompt. `threshold` in nats is where the top `rho` of all their tokens begin."""

    model: str
    adapter: str
    prompt: str
    rho: float
    threshold: float
    answers: list[InspectedAnswer]


def read_inspection(path: Path) -> Inspection:
    """The inspection that a record holds. Raises UserError on a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["inspection"]
        answers = [
            InspectedAnswer(answer["name"], answer["finished"], [InspectedToken(**token) for token in answer["tokens"]])
            for answer in found["answers"]
        ]
        return Inspection(**{**found, "answers": answers})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"record {str(path)!r} is damaged: {error!r}") from error


def shared_length(answers: Sequence[Sequence[InspectedToken]]) -> int:
    """How many tokens all answers begin with alike; 0 for fewer than two answers."""
    if len(answers) < 2:
        return 0
    ids = zip(*([token.id for token in answer] for answer in answers), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, ids))
