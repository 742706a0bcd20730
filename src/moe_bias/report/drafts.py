"""What a report says of `train draft`: how many drafts the target accepts, before and after."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bias.evaluation.statistics import estimate_of, percent
from moe_bias.report.content import Block, Note, Topic, slug
from moe_bias.report.record import Record
from moe_bias.report.tables import drafts


def draft(record: Record) -> Iterator[Block]:
    """The share of drafts accepted, and all that was measured of the draft with and without the adapter."""
    rows = record.content["rows"]
    before, after = (percent(estimate_of(row["accepted"])) for row in (rows[0], rows[-1]))
    lead = f"The target {record.settings['target']} accepts {before}% of the draft's tokens before and {after}% after."
    yield Block(Topic.RESULT, record.name, [Note(lead, lead=True), drafts(rows, slug(record.name, "drafts"))])
