"""The tables of `compare`, as they are printed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moe_bias.evaluation.policy_arms import AGAINST, PolicyRow, in_order
from moe_bias.evaluation.statistics import Estimate


def print_policies(console: Console, rows: Sequence[PolicyRow]) -> None:
    """Prints what each arm cost, and how many held-out problems its greedy answers solve."""
    console.print(_costs(rows))
    console.print(_accuracies(rows))


def _costs(rows: Sequence[PolicyRow]) -> Table:
    table = Table(title="Cost of an arm: means over seeds; memory is the process's peak, model included")
    table.title_justify = "left"
    table.add_column("arm", overflow="fold")
    for heading in ("parameters", "seeds", "tokens sampled", "seconds", "of it updating", "peak MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        share = f"{row.updating_share:.1%}" if row.seconds else "-"
        peak = f"{row.peak_bytes / 2**20:,.0f}"
        sampled, seconds = f"{row.sampled_tokens:,}", f"{row.seconds:,.0f}"
        table.add_row(row.name, f"{row.parameters:,}", str(row.seeds), sampled, seconds, share, peak)
    return table


def _accuracies(rows: Sequence[PolicyRow]) -> Table:
    sets = in_order(rows[0].accuracy)
    table = Table(
        title="Problems solved by greedy answers, % [95% interval over problems]; 'before' is before the first step.\n"
        "'by seed' is 'held out' of each training. Last columns: its paired change against other arms, in points",
        title_justify="left",
    )
    table.add_column("arm", overflow="fold")
    against = [name for name in AGAINST if any(name in row.change for row in rows)]
    for heading in ("by seed", *sets, *(f"to {name}" for name in against)):
        table.add_column(heading, justify="right")
    for row in rows:
        changes = [_interval(row.change[name], "{:+.1f}") if name in row.change else "-" for name in against]
        seeds = ", ".join(f"{100 * value:.0f}" for value in row.by_seed)
        table.add_row(row.name, seeds, *(_interval(row.accuracy[name], "{:.1f}") for name in sets), *changes)
    return table


def _interval(estimate: Estimate, form: str) -> str:
    value, low, high = (form.format(100 * part) for part in (estimate.value, estimate.low, estimate.high))
    return f"{value}\n[{low}, {high}]"
