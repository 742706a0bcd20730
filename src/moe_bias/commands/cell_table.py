"""The tables of a sweep or of arms, as they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from moe_bias.evaluation.statistics import Estimate
from moe_bias.evaluation.strata import STRATA
from moe_bias.experiments.cells import Row


def print_cells(console: Console, rows: Sequence[Row], base: str, tokens: int) -> None:
    """Prints what each row cost, then its NLL and, on a second line, the change against the base cell."""
    console.print(_costs(rows))
    console.print(_likelihoods(rows, base, tokens))


def _costs(rows: Sequence[Row]) -> Table:
    table = Table(title="Spread: largest less smallest NLL of a seed. Seconds: features and training")
    table.title_justify = "left"
    table.add_column("cell", overflow="fold")
    for heading in ("parameters", "seeds", "spread", "tokens trained on", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        trained, seconds = f"{row.train_tokens:,}", f"{row.seconds:,.1f}"
        table.add_row(row.name, f"{row.parameters:,}", str(row.seeds), f"{row.spread:.4f}", trained, seconds)
    return table


def _likelihoods(rows: Sequence[Row], base: str, tokens: int) -> Table:
    table = Table(
        title=f"{tokens:,} held-out tokens, NLL in nats per token, 95% intervals over examples in brackets;\n"
        f"second lines: paired change against {base}.\n"
        "High entropy: the top 20% of the tokens by the base model's entropy",
        title_justify="left",
    )
    table.add_column("cell", overflow="fold")
    for stratum in STRATA:
        table.add_column("all tokens" if stratum == "all" else f"{stratum} entropy", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *(_nll(row, stratum) for stratum in STRATA))
    return table


def _nll(row: Row, stratum: str) -> str:
    value = _interval(row.nll, stratum, "{:.3f}")
    return value if row.change is None else f"{value}\n{_interval(row.change, stratum, '{:+.3f}')}"


def _interval(estimates: Mapping[str, Estimate], stratum: str, form: str) -> str:
    if stratum not in estimates:
        return "-"
    estimate = estimates[stratum]
    return f"{form.format(estimate.value)} [{form.format(estimate.low)}, {form.format(estimate.high)}]"
