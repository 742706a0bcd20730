"""The token inspector: both models' answers to one prompt, token by token, as one page without a network.

The page aligns the answers at the first difference: what they begin alike is shown once, because base
and adapted distributions after the same tokens are the same in both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from moe_bias.mistakes import UserError
from moe_bias.records import write_whole
from moe_bias.report.template import Markup, json_in_html, rendered

SHOWN = 2000
"""Tokens of an answer that the page shows at most, to stay quick and small; it says so where there are more."""
_DIGITS = 5


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


def write_page(path: Path, inspection: Inspection) -> None:
    """The inspector as a page of its own."""
    remark = f"{inspection.model} with {inspection.adapter}"
    shown = component(inspection, "inspector")
    text = rendered("inspector.html", title="Token inspector", remark=remark, inspection=shown)
    write_whole(path, text.encode())


def component(inspection: Inspection, name: str) -> dict[str, Any]:
    """What the template `inspection.html` needs; `name` is one that no other on the page has."""
    return {"id": name, "prompt": inspection.prompt, "data": Markup(json_in_html(page_data(inspection)))}


def page_data(inspection: Inspection) -> dict[str, Any]:
    """What the page's script reads: the beginning that all answers share, then what is left of each."""
    alike = shared_length([answer.tokens for answer in inspection.answers])
    parts = [_part(inspection, answer, alike) for answer in inspection.answers]
    if alike:
        parts.insert(0, _shared_part(inspection, alike))
    return {"rho": inspection.rho, "threshold": inspection.threshold, "parts": parts}


def shared_length(answers: Sequence[Sequence[InspectedToken]]) -> int:
    """How many tokens all answers begin with alike; 0 for fewer than two answers."""
    if len(answers) < 2:
        return 0
    ids = zip(*([token.id for token in answer] for answer in answers), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, ids))


def _shared_part(inspection: Inspection, alike: int) -> dict[str, Any]:
    tokens = inspection.answers[0].tokens[:alike]
    name = "all" if len(inspection.answers) > 2 else "both"
    return {
        "name": name,
        "title": f"{name} answers begin alike: {_tokens(alike)}{_cut(len(tokens))}".capitalize(),
        "shared": True,
        "start": 0,
        "tokens": _shown(tokens, inspection.threshold),
    }


def _part(inspection: Inspection, answer: InspectedAnswer, start: int) -> dict[str, Any]:
    tokens = answer.tokens[start:]
    end = "" if answer.finished else ", cut at the limit"
    where = f", from token {start + 1} on" if start and tokens else ""
    count = _tokens(len(tokens)) if tokens or not start else "ends here"
    return {
        "name": answer.name,
        "title": f"{answer.name}: {count}{where}{end}{_cut(len(tokens))}",
        "shared": False,
        "start": start,
        "tokens": _shown(tokens, inspection.threshold),
    }


def _tokens(count: int) -> str:
    return f"{count:,} token" if count == 1 else f"{count:,} tokens"


def _cut(count: int) -> str:
    return f"; the first {SHOWN:,} are shown" if count > SHOWN else ""


def _shown(tokens: Sequence[InspectedToken], threshold: float) -> list[dict[str, Any]]:
    return [{**_rounded(asdict(token)), "fork": token.entropy >= threshold} for token in tokens[:SHOWN]]


def _rounded(value: Any) -> Any:
    """The same with short numbers, which are most of the page."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
