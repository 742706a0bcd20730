"""What a report says of an evaluation: each arm's accuracy, by level and subject too, how its answers are written,
and how it was asked.

Records of before loops were measured are without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_bias.evaluation.statistics import estimate_of, percent, points
from moe_bias.report import figures
from moe_bias.report.content import (
    Block,
    Note,
    Part,
    Plot,
    Topic,
    slug,
)
from moe_bias.report.record import Record
from moe_bias.report.table import Table
from moe_bias.report.tables import by_group, changes_in_writing, scores


def evaluation(record: Record) -> Iterator[Block]:
    """Accuracy with paired changes, then everything else that was measured of each arm."""
    problems, arms = record.content["problems"], record.content["arms"]
    accuracy = [(arm["name"], estimate_of(arm["accuracy"])) for arm in arms]
    drawn = figures.intervals(accuracy, "% of samples right, mean over problems", "{:.1f}", scale=100)
    title = f"Accuracy on {problems['name']}, with 95% intervals over problems"
    plot = Plot(slug(record.name, "accuracy"), title, drawn)
    parts: list[Part] = [Note(_lead(record), lead=True), plot, _scores(record)]
    if len(arms) > 1 and all("changes" in arm for arm in arms):
        parts.append(changes_in_writing(arms, slug(record.name, "writing")))
    yield Block(Topic.RESULT, record.name, parts)
    groups = [part for column in arms[0]["groups"] for part in _group(record, column)]
    if groups:
        yield Block(Topic.ACCURACY, record.name, groups)


def _lead(record: Record) -> str:
    problems, protocol, arms = record.content["problems"], record.content["protocol"], record.content["arms"]
    last = arms[-1]
    count = protocol["samples"]
    asked = (
        f"{problems['count']:,} problems of {problems['name']}, {count} {'answer' if count == 1 else 'answers'} each"
    )
    changes = "; ".join(
        f"{points(estimate_of(change))} points against {other}" for other, change in last["change"].items()
    )
    right = f"{last['name']}: {percent(estimate_of(last['accuracy']))}% right on {asked}"
    return f"{right}; {changes}, paired by problem." if changes else f"{right}."


def _scores(record: Record) -> Table:
    asked = ", ".join(
        f"{name} {value}" for name, value in record.content["protocol"].items() if name != "prompt_template"
    )
    caption = f"Samples right, mean over problems [95% interval over problems]; changes are paired. Asked with {asked}"
    return scores(record.content["arms"], caption, slug(record.name, "scores"))


def _group(record: Record, column: str) -> Iterator[Plot | Table]:
    """Accuracy by one column: a table of all arms, a plot of the last one."""
    arms: Sequence[Mapping[str, Any]] = record.content["arms"]
    last = arms[-1]
    values = last["groups"][column]
    rows = [(value, estimate_of(score["accuracy"])) for value, score in values.items()]
    drawn = figures.intervals(rows, f"% of samples right, {last['name']}", "{:.1f}", scale=100)
    title = f"Accuracy of {last['name']} by {column}, with 95% intervals over problems"
    yield Plot(slug(record.name, f"by-{column}"), title, drawn)
    yield by_group(arms, column, slug(record.name, f"by-{column}"))
