"""The report as one HTML file that needs no network: styles, scripts and figures are in it."""

from __future__ import annotations

from typing import Any

from moe_bias.analysis import Reading, marked, spelled
from moe_bias.analysis.inspection import Inspection
from moe_bias.report.content import Block, Card, Cards, Part, Plot, Report, slug
from moe_bias.report.figures import page_svg
from moe_bias.report.inspector import component
from moe_bias.report.table import Table
from moe_bias.report.template import Markup, rendered


def page(report: Report) -> str:
    """The file's text."""
    sections = [
        {"title": topic.value, "id": topic.name.lower(), "blocks": [_block(block) for block in blocks]}
        for topic, blocks in report.sections()
    ]
    return rendered("report.html", report=report, sections=sections, several=len(report.runs) > 1)


def _block(block: Block) -> dict[str, Any]:
    return {
        "run": block.run,
        "parts": [_part(part, number, block) for number, part in enumerate(block.parts)],
    }


def _part(part: Part, number: int, block: Block) -> dict[str, Any]:
    if isinstance(part, Plot):
        return {"kind": "plot", "plot": part, "svg": Markup(page_svg(part.figure, part.name, part.title))}
    if isinstance(part, Inspection):
        return {"kind": "inspection", "inspection": component(part, slug(block.run, f"inspector-{number}"))}
    if isinstance(part, Cards):
        return {"kind": "cards", "cards": part, "experts": [_card(card) for card in part.cards]}
    if isinstance(part, Table):
        return {"kind": "table", "table": part}
    return {"kind": "lead" if part.lead else "note", "text": part.text}


def _card(card: Card) -> dict[str, Any]:
    """With the length of each token's bar as a share of the card's longest."""
    view = card.view
    longest = max((abs(token.bias) for token in (*view.raised, *view.lowered)), default=1.0)
    sides = {
        name: [(marked(token), token.bias, abs(token.bias) / longest) for token in side]
        for name, side in (("raises", view.raised), ("lowers", view.lowered))
    }
    return {"card": card, "sides": sides, "readings": [_reading(reading) for reading in view.readings]}


def _reading(reading: Reading) -> dict[str, Any]:
    """The tokens of each side, under what it does."""
    return {
        "size": reading.size,
        "sides": {
            "raises": [marked(token) for token in reading.raised],
            "lowers": [marked(token) for token in reading.lowered],
            "leaning to": [spelled(token) for token in reading.toward],
            "away from": [spelled(token) for token in reading.away],
        },
    }
