"""What a report says of arms side by side: `arms` and `sweep`, `compare`, and the demonstration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_bias.evaluation.statistics import estimate_of, percent, points, with_interval
from moe_bias.experiments.policy_arms import HELD_OUT
from moe_bias.report import figures
from moe_bias.report.content import Block, Note, Plot, Topic, slug
from moe_bias.report.record import Record
from moe_bias.report.table import Table
from moe_bias.report.tables import demonstration, likelihoods, solved

_NLL = "nats per token"
MAIN = "moe-bias"
SAMPLES = 8


def cells(record: Record) -> Iterator[Block]:
    """NLL of each cell or arm, and the change against one of them, by stratum."""
    rows, base = record.content["rows"], record.content["base"]
    total = [(row["name"], estimate_of(row["nll"]["all"])) for row in rows]
    plot = Plot(
        slug(record.name, "nll"),
        "Held-out NLL of each arm, with 95% intervals over examples",
        figures.intervals(total, _NLL),
    )
    table = likelihoods(rows, base, slug(record.name, "strata"))
    yield Block(Topic.RESULT, record.name, [Note(_cells_lead(rows, base), lead=True), plot])
    yield Block(Topic.ACCURACY, record.name, [table, *_changes(record, rows, base)])


def _cells_lead(rows: Sequence[Mapping[str, Any]], base: str) -> str:
    """The arm that all are compared with, and against it the frozen model and the best of the others."""
    main = next(row for row in rows if row["name"] == base)
    others = [row for row in rows if row["change"]]
    best = min((row for row in others if row["parameters"]), key=lambda row: row["nll"]["all"]["value"], default=None)
    named = [row for row in others if not row["parameters"] or row is best]
    changes = ", ".join(f"{row['name']} {with_interval(estimate_of(row['change']['all']), '{:+.3f}')}" for row in named)
    lead = f"{base}: held-out NLL {with_interval(estimate_of(main['nll']['all']), '{:.3f}')} {_NLL}"
    return f"{lead}. Against it, paired by example: {changes}." if changes else f"{lead}."


def _changes(record: Record, rows: Sequence[Mapping[str, Any]], base: str) -> Iterator[Plot]:
    for stratum in ("high", "low"):
        changed = [
            (row["name"], estimate_of(row["change"][stratum]))
            for row in rows
            if row["change"] and stratum in row["change"]
        ]
        if changed:
            drawn = figures.intervals(changed, f"change of NLL against {base}, {_NLL}", "{:+.3f}", zero=True)
            title = f"Paired change of NLL on {_of(stratum)}, with 95% intervals"
            yield Plot(slug(record.name, f"change-{stratum}"), title, drawn)


def _of(stratum: str) -> str:
    return "all tokens" if stratum == "all" else f"{stratum}-entropy tokens"


def arms(record: Record) -> Iterator[Block]:
    """Accuracy of each arm of reinforcement learning, changes against others, and its curve."""
    rows = record.content["rows"]
    held_out = [(row["name"], estimate_of(row["accuracy"][HELD_OUT])) for row in rows]
    main = next((row for row in rows if row["name"] == MAIN), rows[-1])
    changes = "; ".join(
        f"{points(estimate_of(change))} points against {other}" for other, change in main["change"].items()
    )
    lead = f"{main['name']} solves {percent(estimate_of(main['accuracy'][HELD_OUT]))}% of the held-out problems"
    plot = Plot(
        slug(record.name, "accuracy"),
        "Held-out accuracy of each arm, with 95% intervals over problems",
        figures.intervals(held_out, "% of the held-out problems", "{:.1f}", scale=100),
    )
    yield Block(Topic.RESULT, record.name, [Note(f"{lead}{': ' if changes else ''}{changes}.", lead=True), plot])
    plots = [
        Plot(
            slug(record.name, f"{name} curves"),
            f"Problems solved by each arm over the steps ({name}), means over seeds",
            figures.curves(lines, "step", "problems solved, %"),
        )
        for name, lines in _curves(record).items()
    ]
    if plots:
        yield Block(Topic.TRAINING, record.name, plots)
    yield Block(Topic.ACCURACY, record.name, [solved(rows, slug(record.name, "sets"))])


def _curves(record: Record) -> dict[str, dict[str, figures.Line]]:
    """By set of problems and arm the mean over its seeds of accuracy, in percent, at each step."""
    seen: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for part in record.parts:
        for step, sets in part["arm"]["curve"]:
            for name, accuracy in sets.items():
                seen[name, part["arm"]["name"]][step].append(100 * accuracy)
    curves: dict[str, dict[str, figures.Line]] = defaultdict(dict)
    for (name, arm), steps in seen.items():
        curves[name][arm] = (list(steps), [sum(values) / len(values) for values in steps.values()])
    return curves


def demo(record: Record) -> Iterator[Block]:
    """NLL and accuracy of the demonstration's arms, and some of their answers."""
    rows = record.content["arms"]
    last = rows[-1]
    accuracy, change = estimate_of(last["accuracy"]), estimate_of(last["accuracy_change"])
    lead = (
        f"{last['name']} answers {percent(accuracy)}% of {len(record.content['samples']):,} held-out "
        f"problems right, {points(change)} points against {rows[-2]['name']}."
    )
    shown = {
        "accuracy": ("% of the held-out problems", "{:.1f}", 100.0, "Held-out accuracy of each arm, 95% intervals"),
        "nll": (_NLL, "{:.3f}", 1.0, "Held-out NLL of each arm, 95% intervals"),
    }
    plots = [
        Plot(
            slug(record.name, key),
            title,
            figures.intervals([(row["name"], estimate_of(row[key])) for row in rows], unit, form, scale=scale),
        )
        for key, (unit, form, scale, title) in shown.items()
    ]
    caption = "The arms, each with its paired change to the one before [95% interval over problems]"
    table = demonstration(rows, caption, slug(record.name, "arms"))
    yield Block(Topic.RESULT, record.name, [Note(lead, lead=True), *plots, table])
    yield Block(Topic.TOKENS, record.name, [_answers(record, [row["name"] for row in rows])])


def _answers(record: Record, names: Sequence[str]) -> Table:
    shown = record.content["samples"][:SAMPLES]
    rows = [
        [
            sample["question"],
            sample["gold"],
            *(
                f"{'right' if right else 'wrong'}: {answer}"
                for answer, right in zip(sample["answers"], sample["correct"], strict=True)
            ),
        ]
        for sample in shown
    ]
    headings = ["problem", "gold answer", *names]
    caption = f"The first {len(shown)} of {len(record.content['samples']):,} held-out problems"
    return Table.of_texts(slug(record.name, "answers"), caption, headings, rows, words=len(headings), folded=True)
