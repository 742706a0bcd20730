"""A report from records: what each kind of record has to say, what all cost, and what they were made with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moe_bias.analysis.inspection import read_inspection
from moe_bias.records import RecordKind
from moe_bias.report import analysis, comparison, drafts, evaluation, headroom, labels, training
from moe_bias.report.content import Block, Note, Report, Topic, slug
from moe_bias.report.cost import cost_block
from moe_bias.report.record import Record
from moe_bias.report.table import Table

NOT_RECORDED = "not recorded"


def build(records: Sequence[Record], title: str) -> Report:
    """The report of these records; the title is made of their names where it is empty."""
    names = ", ".join(record.name for record in records)
    model = next((record.model for record in records if record.model is not None), NOT_RECORDED)
    blocks = [block for record in records for block in _BLOCKS[record.kind](record)]
    cost = cost_block(records)
    if cost is not None:
        blocks.append(cost)
    blocks += [block for record in records for block in _settings(record)]
    runs = [(record.name, record.kind.value) for record in records]
    return Report(title or names, model, runs, blocks)


def _inspection(record: Record) -> Iterator[Block]:
    yield Block(Topic.TOKENS, record.name, [read_inspection(record.path)])


_BLOCKS: Mapping[RecordKind, Callable[[Record], Iterator[Block]]] = {
    RecordKind.SUPERVISED: training.supervised,
    RecordKind.POLICY: training.policy,
    RecordKind.CELLS: comparison.cells,
    RecordKind.ARMS: comparison.arms,
    RecordKind.EVALUATION: evaluation.evaluation,
    RecordKind.ANALYSIS: analysis.analysis,
    RecordKind.DEMO: comparison.demo,
    RecordKind.INSPECTION: _inspection,
    RecordKind.LABELS: labels.labels,
    RecordKind.HEADROOM: headroom.headroom,
    RecordKind.DRAFT: drafts.draft,
}


def _settings(record: Record) -> Iterator[Block]:
    """Everything that the record says of how it was made, as names and values."""
    rows = [*_flat("", record.settings), *_flat("", record.provenance)]
    if rows:
        caption = f"Settings and provenance of {record.name}"
        table = Table.of_texts(slug(record.name, "settings"), caption, ["name", "value"], rows, 2, folded=True)
        yield Block(Topic.SETTINGS, "", [table])
    else:
        yield Block(Topic.SETTINGS, "", [Note(f"The record of {record.name} says neither settings nor provenance.")])


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield [f"{prefix}{name}", str(value)]
