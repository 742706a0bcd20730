"""The tables of `compare`, as they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from moe_bias.evaluation.statistics import Estimate
from moe_bias.experiments.policy_arms import AGAINST, HELD_OUT, PolicyRow, measured_after, percent_by_seed


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
    sets = measured_after(rows[0].accuracy)
    table = Table(
        title="Problems solved by greedy answers, % [95% interval over problems]; 'gained' by the steps, in points.\n"
        "'by seed' is 'held out' of each training. Last columns: its paired change against other arms, in points; and\n"
        "tokens of an answer to a held-out problem, with their change by the steps",
        title_justify="left",
    )
    table.add_column("arm", overflow="fold")
    against = [name for name in AGAINST if any(name in row.change for row in rows)]
    solved = [heading for name in sets for heading in (name, "gained")]
    for heading in ("by seed", *solved, *(f"to {name}" for name in against), "tokens", "by steps"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [cell for name in sets for cell in (_interval(row.accuracy[name], "{:.1f}"), _change(row.gain, name))]
        cells += [_change(row.change, name) for name in against]
        cells += [_tokens(row.tokens, "{:.0f}"), _tokens(row.tokens_gain, "{:+.0f}") if row.gain else "-"]
        table.add_row(row.name, percent_by_seed(row.by_seed), *cells)
    return table


def _change(found: Mapping[str, Estimate], name: str) -> str:
    return _interval(found[name], "{:+.1f}") if name in found else "-"


def _tokens(found: Mapping[str, Estimate], form: str) -> str:
    return _interval(found[HELD_OUT], form, 1) if HELD_OUT in found else "-"


def _interval(estimate: Estimate, form: str, scale: float = 100) -> str:
    value, low, high = (form.format(scale * part) for part in (estimate.value, estimate.low, estimate.high))
    return f"{value}\n[{low}, {high}]"
