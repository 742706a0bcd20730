"""What a report says of an evaluation: each arm's accuracy, by level and subject too, how its answers are written,
and how it was asked.

Records of before loops were measured are without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moe_bias.evaluation.scores import CUT, DISTINCT, LOOPING, TOKENS
from moe_bias.evaluation.statistics import Estimate
from moe_bias.report import figures
from moe_bias.report.content import (
    Block,
    Note,
    Part,
    Plot,
    Table,
    Topic,
    estimate_of,
    percent,
    points,
    slug,
    with_interval,
    without_empty_columns,
)
from moe_bias.report.record import Record


def evaluation(record: Record) -> Iterator[Block]:
    """Accuracy with paired changes, then everything else that was measured of each arm."""
    problems, arms = record.content["problems"], record.content["arms"]
    accuracy = [(arm["name"], estimate_of(arm["accuracy"])) for arm in arms]
    drawn = figures.intervals(accuracy, "% of samples right, mean over problems", "{:.1f}", scale=100)
    title = f"Accuracy on {problems['name']}, with 95% intervals over problems"
    plot = Plot(slug(record.name, "accuracy"), title, drawn)
    parts: list[Part] = [Note(_lead(record), lead=True), plot, _scores(record)]
    if len(arms) > 1 and all("changes" in arm for arm in arms):
        parts.append(_written_changes(record))
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
    arms = record.content["arms"]
    passes = list(arms[0]["pass_at"])
    others = list(dict.fromkeys(other for arm in arms for other in arm["change"]))
    failures = list(arms[0]["failures"])
    headings = ["arm", "right, %", *(f"to {other}, points" for other in others), *(f"pass@{k}, %" for k in passes)]
    headings += ["majority, %", "tokens", "cut, %", "loops, %", "distinct-4, %", *(f"{name}, %" for name in failures)]
    rows = [
        [
            arm["name"],
            percent(estimate_of(arm["accuracy"])),
            *(_optional(arm["change"].get(other), points) for other in others),
            *(percent(estimate_of(arm["pass_at"][k])) for k in passes),
            _optional(arm["majority"], percent),
            _optional(arm["tokens"], lambda tokens: with_interval(tokens, "{:,.0f}")),
            f"{100 * arm['cut']:.1f}",
            _optional(arm.get(LOOPING), percent),
            _optional(arm.get(DISTINCT), percent),
            *(f"{100 * arm['failures'][name]:.1f}" for name in failures),
        ]
        for arm in arms
    ]
    asked = ", ".join(
        f"{name} {value}" for name, value in record.content["protocol"].items() if name != "prompt_template"
    )
    caption = f"Samples right, mean over problems [95% interval over problems]; changes are paired. Asked with {asked}"
    return without_empty_columns(Table(slug(record.name, "scores"), caption, headings, rows))


def _written_changes(record: Record) -> Table:
    """Of each arm to each before it, what changed in how the answers are written."""
    forms = {TOKENS: lambda change: with_interval(change, "{:+,.0f}"), CUT: points, LOOPING: points, DISTINCT: points}
    rows = [
        [
            arm["name"],
            other,
            *(_optional(arm["changes"].get(name, {}).get(other), form) for name, form in forms.items()),
        ]
        for arm in record.content["arms"]
        for other in arm["change"]
    ]
    headings = ["arm", "to", "tokens", "cut, points", "loops, points", "distinct-4, points"]
    caption = (
        "Change of how the answers are written, paired by problem [95% interval over problems]: an answer loops that "
        "ends in a block repeated 4 times or more; distinct-4 is the share of runs of four words that are different"
    )
    return without_empty_columns(Table(slug(record.name, "writing"), caption, headings, rows, words=2))


def _group(record: Record, column: str) -> Iterator[Plot | Table]:
    """Accuracy by one column: a table of all arms, a plot of the last one."""
    arms: Sequence[Mapping[str, Any]] = record.content["arms"]
    last = arms[-1]
    values = last["groups"][column]
    rows = [(value, estimate_of(score["accuracy"])) for value, score in values.items()]
    drawn = figures.intervals(rows, f"% of samples right, {last['name']}", "{:.1f}", scale=100)
    title = f"Accuracy of {last['name']} by {column}, with 95% intervals over problems"
    yield Plot(slug(record.name, f"by-{column}"), title, drawn)
    cells = [
        [value, f"{score['problems']:,}", *(_of_group(arm, column, value) for arm in arms)]
        for value, score in values.items()
    ]
    headings = [column, "problems", *(f"{arm['name']}, %" for arm in arms)]
    yield Table(
        slug(record.name, f"by-{column}"), f"Samples right by {column} [95% interval over problems]", headings, cells
    )


def _of_group(arm: Mapping[str, Any], column: str, value: str) -> str:
    return percent(estimate_of(arm["groups"][column][value]["accuracy"]))


def _optional(found: Mapping[str, float | None] | None, form: Callable[[Estimate], str]) -> str:
    return "" if found is None else form(estimate_of(found))
