"""What a report says of `headroom`: the verdict, what each probe was measured to do, and what is not known."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bias.report.content import Block, Note, Topic, slug
from moe_bias.report.record import Record
from moe_bias.report.tables import probes


def headroom(record: Record) -> Iterator[Block]:
    """The verdict, the probes, and what more tokens are expected to bring."""
    content = record.content
    table = probes(content, slug(record.name, "headroom"))
    yield Block(
        Topic.RESULT, record.name, [Note(f"{content['verdict']}.", lead=True), table, *map(Note, content["notes"])]
    )
