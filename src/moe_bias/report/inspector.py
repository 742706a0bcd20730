"""The token inspector: both models' answers to one prompt, token by token, as one page without a network.

The page aligns the answers at the first difference: what they begin alike is shown once, because base
and adapted distributions after the same tokens are the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_bias.analysis.inspection import InspectedAnswer, InspectedToken, Inspection, shared_length
from moe_bias.records import write_whole
from moe_bias.report.template import Markup, json_in_html, rendered

SHOWN = 2000
"""Tokens of an answer that the page shows at most, to stay quick and small; it says so where there are more."""
_DIGITS = 5


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
