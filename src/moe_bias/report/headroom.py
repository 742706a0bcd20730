"""What a report says of `headroom`: the verdict, and what each probe was measured to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_bias.evaluation.statistics import estimate_of, percent, with_interval
from moe_bias.report.content import Block, Note, Topic, slug
from moe_bias.report.record import Record
from moe_bias.report.table import Table

HEADINGS = ["probe", "parameters", "held-out NLL", "change", "of high entropy", "of low entropy", "right there, %"]


def headroom(record: Record) -> Iterator[Block]:
    """The verdict, the probes, and what more tokens are expected to bring."""
    content = record.content
    table = probes(content, slug(record.name, "headroom"))
    yield Block(
        Topic.RESULT, record.name, [Note(f"{content['verdict']}.", lead=True), table, *map(Note, content["notes"])]
    )


def probes(content: Mapping[str, Any], name: str = "") -> Table:
    """What each probe of a record was measured to do, and what more tokens are expected to bring to the layer."""
    caption = (
        "NLL in nats per token [95% interval over examples], paired change to the base, and how often the answer's "
        "token is the likeliest one at high entropy; what is expected has its interval over learning curves"
    )
    rows = [_probe(probe) for probe in content["probes"]]
    forecast = sorted(content["forecast"]["nll"].items(), key=lambda expected: int(expected[0]))
    rows += [_expected(tokens, nll) for tokens, nll in forecast]
    return Table.of_texts(name, caption, HEADINGS, rows)


def _probe(probe: Mapping[str, Any]) -> list[str]:
    """A probe of a record."""
    nll, picked = with_interval(estimate_of(probe["nll"]["all"]), "{:.3f}"), percent(estimate_of(probe["picked"]))
    changes = ["", "", ""]
    if probe["parameters"]:
        changes = [with_interval(estimate_of(probe["change"][name]), "{:+.3f}") for name in ("all", "high", "low")]
    return [probe["name"], f"{probe['parameters']:,}", nll, *changes, picked]


def _expected(tokens: str, nll: Mapping[str, float]) -> list[str]:
    """What so many tokens are expected to bring to the layer."""
    expected = f"{with_interval(estimate_of(nll), '{:.3f}')} expected"
    return [f"moe-bias, {int(tokens):,} tokens", "", expected, "", "", "", ""]
