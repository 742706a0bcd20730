"""The table of a sweep or of arms, as it is printed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moe_bias.evaluation.cells import Row
from moe_bias.evaluation.statistics import Estimate
from moe_bias.evaluation.strata import STRATA

_HEADINGS = {"all": "held-out NLL", "high": "high entropy", "low": "low entropy"}


def print_cells(console: Console, rows: Sequence[Row], base: str, tokens: int) -> None:
    """Prints a line of NLL per row and, below it, its change against the base cell."""
    table = Table(
        title=f"{tokens:,} held-out tokens, NLL in nats per token, 95% intervals over examples in brackets;\n"
        f"second lines: paired change against {base}; high entropy is the top 20% by the base model's entropy",
        title_justify="left",
    )
    table.add_column("cell", overflow="fold")
    for heading in ("parameters", "seeds", "spread", "tokens", "seconds", *(_HEADINGS[name] for name in STRATA)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_words(row), *(_nll(row, stratum) for stratum in STRATA))
    console.print(table)


def _words(row: Row) -> list[str]:
    seeds = str(row.seeds) if row.parameters else "-"
    return [row.name, f"{row.parameters:,}", seeds, f"{row.spread:.4f}", f"{row.train_tokens:,}", f"{row.seconds:,.1f}"]


def _nll(row: Row, stratum: str) -> str:
    value = _interval(row.nll[stratum], "{:.4f}")
    return value if row.change is None else f"{value}\n{_interval(row.change[stratum], '{:+.4f}')}"


def _interval(estimate: Estimate, form: str) -> str:
    return f"{form.format(estimate.value)} [{form.format(estimate.low)}, {form.format(estimate.high)}]"
