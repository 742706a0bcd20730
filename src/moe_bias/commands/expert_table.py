"""How a terminal shows what experts say: the tokens of a side, and the readings of linear experts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from moe_bias.analysis import ExpertView, TokenBias, TokenLean, marked, spelled, strongest

OFF_SUPPORT = "in brackets: off the support, where the adapter has no bias"
"""What the marks of `moved` mean."""


def moved(tokens: Sequence[TokenBias], form: str = "{:+.2f}") -> Text:
    """Tokens with their bias, in brackets where the adapter does not act on them; they are text, never markup."""
    return Text(", ".join(f"{marked(token)} {form.format(token.bias)}" for token in tokens))


def leaning(tokens: Sequence[TokenLean]) -> Text:
    """Tokens with their standard deviations; a dash where none stands out."""
    return (
        Text("-")
        if not tokens
        else Text(", ".join(f"{spelled(token)} {abs(token.deviations):.1f}" for token in tokens))
    )


def readings_table(views: Sequence[tuple[int, ExpertView]], top: int) -> Table | None:
    """A row per reading of each numbered expert, `top` tokens a side; None where no expert has any."""
    rows = [(number, reading) for number, view in views for reading in view.readings]
    if not rows:
        return None
    table = Table(
        "expert",
        "size",
        "leaning to",
        "away from",
        "raises",
        "lowers",
        box=box.SIMPLE_HEAD,
        title="What linear experts read, strongest first: hidden states that lean to these tokens raise and lower "
        "those, in nats per unit read; states that lean away do the opposite. Leaning is in standard deviations over "
        "the vocabulary; - where no token stands out by more than chance.",
        title_justify="left",
    )
    for number, reading in rows:
        sides = (leaning(reading.toward[:top]), leaning(reading.away[:top]))
        moves = (moved(strongest(side, top)) for side in (reading.raised, reading.lowered))
        table.add_row(str(number), f"{reading.size:.3g}", *sides, *moves)
    return table
