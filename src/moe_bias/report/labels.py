"""What a report says of ways to choose among labels: accuracy by number of labels, calibration, and costs."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bias.evaluation.statistics import estimate_of, percent
from moe_bias.evaluation.statistics import points as in_points
from moe_bias.experiments.labels import MAIN
from moe_bias.report import figures
from moe_bias.report.content import Block, Note, Plot, Topic, slug
from moe_bias.report.record import Record
from moe_bias.report.tables import ways


def labels(record: Record) -> Iterator[Block]:
    """The accuracy of all ways with the most labels, then everything with every number of them."""
    rows = record.content["rows"]
    most = max(row["count"] for row in rows)
    shown = [(row["way"], estimate_of(row["accuracy"])) for row in rows if row["count"] in (0, most)]
    title = f"Accuracy with {most:,} labels, with 95% intervals over texts"
    drawn = figures.intervals(shown, "% of texts right", "{:.1f}", scale=100)
    plot = Plot(slug(record.name, "accuracy"), title, drawn)
    table = ways(rows, slug(record.name, "ways"))
    yield Block(Topic.RESULT, record.name, [Note(_lead(record, most), lead=True), plot, table])


def _lead(record: Record, most: int) -> str:
    content = record.content
    main = next((row for row in content["rows"] if row["way"] == MAIN and row["count"] == most), None)
    what = f"{content['texts']:,} texts of {content['source']}, labels {', '.join(content['labels'])}"
    if main is None:
        return f"{what}."
    led = [row for row in content["rows"] if row["count"] == most and row["lead"]]
    against = ", ".join(f"{in_points(estimate_of(row['lead']['accuracy']))} points to {row['way']}" for row in led)
    right = f"MoE-Bias with {most:,} labels: {percent(estimate_of(main['accuracy']))}% right on {what}"
    return f"{right}; {against}." if against else f"{right}."
