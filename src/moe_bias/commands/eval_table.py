"""The tables of `eval`, as they are printed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moe_bias.evaluation.scores import CUT, DISTINCT, LOOPING, TOKENS, Score
from moe_bias.evaluation.statistics import Estimate
from moe_bias.tasks.benchmarks import ProblemSet, Protocol


def print_scores(console: Console, found: Sequence[Score], protocol: Protocol, problems: ProblemSet) -> None:
    """Prints what each arm scores, how its answers are written, accuracy by level and subject where the problems
    have them, and changes between arms.
    """
    console.print(_scores(found, protocol, problems))
    console.print(_writing(found))
    for column in found[0].groups:
        console.print(_by_group(found, column))
    if len(found) > 2:
        console.print(_changes(found))


def _scores(found: Sequence[Score], protocol: Protocol, problems: ProblemSet) -> Table:
    n, first = protocol.samples, found[0]
    table = Table(title=_title(protocol, problems), title_justify="left")
    table.add_column("arm", overflow="fold")
    headings = [f"avg@{n}", f"to {first.name}"] if len(found) > 1 else [f"avg@{n}"]
    if first.majority is not None:
        headings += [f"pass@{n}", f"maj@{n}"]
    has_bad_golds = any(score.failures["bad gold"] for score in found)
    for heading in (*headings, "unread", *(["bad gold"] if has_bad_golds else [])):
        table.add_column(heading, justify="right")
    for score in found:
        cells = [percent(score.accuracy)]
        if len(found) > 1:
            cells.append(percent(score.change[first.name], "+.1f") if score.change else "-")
        if score.majority is not None:
            cells += [percent(score.pass_at[str(n)]), percent(score.majority)]
        unread = score.failures["unparseable"] + score.failures["timed out"]
        bad_golds = [f"{score.failures['bad gold']:.0%}"] if has_bad_golds else []
        table.add_row(score.name, *cells, f"{unread:.0%}", *bad_golds)
    return table


def _title(protocol: Protocol, problems: ProblemSet) -> str:
    drawn = (
        "greedy answers"
        if protocol.temperature == 0
        else (f"{protocol.samples} samples each at temperature {protocol.temperature:g}, top-p {protocol.top_p:g}")
    )
    return (
        f"{problems.name}: {len(problems.problems)} problems\n"
        f"{drawn}, at most {protocol.max_new_tokens:,} tokens\n"
        "% [95% interval over problems], change paired by problem; unread by the grader"
    )


def _writing(found: Sequence[Score]) -> Table:
    first = found[0].name
    title = (
        "How the answers are written: tokens, % cut by the limit, % that loop,\n"
        "% of runs of four words that are different ones (distinct-4)"
    )
    against = f"\nsecond lines: change to {first}, paired by problem" if len(found) > 1 else ""
    table = Table(title=title + against, title_justify="left")
    table.add_column("arm", overflow="fold")
    for heading in ("tokens", "cut", "loops", "distinct-4"):
        table.add_column(heading, justify="right")
    for score in found:
        length = "-" if score.tokens is None else f"{score.tokens.value:,.0f}"
        cells = [length, f"{100 * score.cut:.1f}", on_line(score.looping), on_line(score.distinct)]
        table.add_row(score.name, *cells)
        if score.change:
            table.add_row("", *(_written_change(score, name, first) for name in (TOKENS, CUT, LOOPING, DISTINCT)))
    return table


def _written_change(score: Score, quantity: str, other: str) -> str:
    change = score.changes.get(quantity, {}).get(other)
    if change is None:
        return "-"
    return on_line(change, "+,.0f", 1) if quantity == TOKENS else on_line(change, "+.1f")


def _by_group(found: Sequence[Score], column: str) -> Table:
    table = Table(title=f"By {column}; with fewer than two problems it is left out", title_justify="left")
    table.add_column(column, overflow="fold")
    table.add_column("problems", justify="right")
    for score in found:
        table.add_column(score.name, justify="right")
    for value, group in found[0].groups[column].items():
        table.add_row(value, str(group.problems), *(percent(score.groups[column][value].accuracy) for score in found))
    return table


def _changes(found: Sequence[Score]) -> Table:
    table = Table(title="Change of accuracy to each arm before, in points", title_justify="left")
    table.add_column("arm", overflow="fold")
    for before in found[:-1]:
        table.add_column(f"to {before.name}", justify="right")
    for score in found[1:]:
        cells = (percent(score.change[arm.name], "+.1f") if arm.name in score.change else "" for arm in found[:-1])
        table.add_row(score.name, *cells)
    return table


def percent(estimate: Estimate, form: str = ".1f") -> str:
    """In percent with its interval below."""
    return on_line(estimate, form).replace(" ", "\n", 1)


def on_line(estimate: Estimate, form: str = ".1f", scale: float = 100) -> str:
    """Times `scale`, in percent if nothing is said, with its interval beside it."""
    value, low, high = (format(scale * part, form) for part in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
