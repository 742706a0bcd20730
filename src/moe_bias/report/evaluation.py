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
from moe_bias.report.tables import by_group, changes_in_writing, equal_tokens, has_lengths, scores


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
    if has_lengths(arms):
        yield Block(Topic.LENGTH, record.name, list(_lengths(record)))
    groups = [part for column in arms[0]["groups"] for part in _group(record, column)]
    if groups:
        yield Block(Topic.ACCURACY, record.name, groups)


def _lengths(record: Record) -> Iterator[Part]:
    """Accuracy at equal tokens; and against tokens, each adapter along its strengths."""
    arms: Sequence[Mapping[str, Any]] = record.content["arms"]
    for name, shown in _drawn_together(arms).items():
        yield Plot(
            slug(record.name, f"equal tokens {name}"),
            f"Accuracy of {name or 'each arm'} under every limit of tokens, against the tokens then spent",
            figures.trade_off({arm["name"]: _under_limits(arm) for arm in shown}, "tokens spent an answer", "right, %"),
            "A line is an arm under limits up to the longest answer of any, with its 95% band over problems: what has "
            "not ended by then is not right. At equal tokens the higher line is better.",
        )
    if len(arms) > 1:
        yield Plot(
            slug(record.name, "trade-off"),
            "Accuracy against tokens of an answer: each adapter at its strengths, beside the first arm under limits",
            figures.trade_off(_by_strength(arms), "tokens an answer", "right, %"),
            "A point is an arm under the limit that all had, with its 95% interval over problems; what has not ended "
            "by then is not right. Lines join an adapter's strengths.",
        )
    yield equal_tokens(arms, slug(record.name, "under limits"))


def _under_limits(arm: Mapping[str, Any]) -> figures.Trade:
    points = arm["at_limits"]
    return figures.Trade([point["tokens"] for point in points], [estimate_of(point["accuracy"]) for point in points])


def _of_one_adapter(arms: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The arms by adapter, in order of strength where there are several."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for arm in arms:
        name = arm["name"] if arm.get("strength") is None else arm["name"].rsplit(" x", 1)[0]
        groups.setdefault(name, []).append(arm)
    return {name: sorted(group, key=_strength) for name, group in groups.items()}


def _strength(arm: Mapping[str, Any]) -> float:
    """That it was measured at, 1 where it was its own."""
    strength = arm.get("strength")
    return 1.0 if strength is None else float(strength)


def _drawn_together(arms: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Every adapter at its strength nearest to 1, under no name; and each at all of its strengths, beside the first."""
    first, groups = arms[0], _of_one_adapter(arms[1:])
    nearest = [min(group, key=lambda arm: abs(_strength(arm) - 1)) for group in groups.values()]
    return {"": [first, *nearest]} | {name: [first, *group] for name, group in groups.items() if len(group) > 1}


def _by_strength(arms: Sequence[Mapping[str, Any]]) -> dict[str, figures.Trade]:
    """The first arm's limits as a line; other arms as points, those of one adapter joined by strength."""
    lines = {arms[0]["name"]: _under_limits(arms[0])}
    for name, group in _of_one_adapter(arms[1:]).items():
        last = [arm["at_limits"][-1] for arm in group]
        found = [estimate_of(point["accuracy"]) for point in last]
        lines[name] = figures.Trade([point["tokens"] for point in last], found, marked=True)
    return lines


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
