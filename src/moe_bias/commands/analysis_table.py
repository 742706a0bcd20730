"""The tables of `analyze`, as they are printed: each adapter's strata, experts, flips and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_bias.analysis import ExpertView, any_off_support, strongest, view_of_record
from moe_bias.analysis.flips import kept_flips
from moe_bias.commands.expert_table import OFF_SUPPORT, moved, readings_table
from moe_bias.evaluation.statistics import estimate_of, percent
from moe_bias.report.tables import FLIP_IN_SHORT, flips, right_answers, strata
from moe_bias.report.terminal import terminal_table

SHOWN_FLIPS = 6
SHOWN_TOKENS = 4
SHOWN_CONTEXT = 40


def print_analysis(console: Console, record: Mapping[str, Any]) -> None:
    """Prints what `analysis.json` holds, shortened."""
    text = record["text"]
    console.print(
        f"{text['tokens']:,} tokens of {text['examples']:,} examples of {text['name']}; high entropy: "
        f"the top {text['rho']:.0%}, from {text['threshold']:.3f} nats",
        highlight=False,
    )
    for adapter in record["adapters"]:
        caption = f"{adapter['name']}: means over tokens, 95% intervals over examples"
        console.print(terminal_table(strata(adapter, caption=caption)))
        console.print(Text(_sentences(adapter)))
        _print_experts(console, adapter["experts"])
        if adapter["answers"] is not None:
            console.print(terminal_table(right_answers(adapter["answers"])))
        if found := kept_flips(adapter):
            shown = flips(found[:SHOWN_FLIPS], "Flips: where the choice changes")
            console.print(terminal_table(shown.only(*FLIP_IN_SHORT)))


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(*headings, title=title)
    table.title_justify = "left"
    return table


def _sentences(adapter: Mapping[str, Any]) -> str:
    known = adapter["mutual_information"]
    told = ", ".join(f"{name} {value['nats']:.3f} of at most {value['at_most']:.3f}" for name, value in known.items())
    series = "".join(
        f"; {percent(estimate_of(point['overlap']))} at step {point['step']:,}" for point in adapter["checkpoints"]
    )
    return (
        f"Of the base's high-entropy tokens, {percent(estimate_of(adapter['overlap']))}% are the adapted model's too"
        f"{series}.\nNats that the expert tells of a token's ... {told}."
    )


def _print_experts(console: Console, cards: Sequence[Mapping[str, Any]]) -> None:
    views = [view_of_record(card) for card in cards]
    console.print(_experts(cards, views))
    readings = readings_table([(card["expert"], view) for card, view in zip(cards, views, strict=True)], SHOWN_TOKENS)
    if readings is not None:
        console.print(readings)
    if any_off_support(views):
        console.print(Text(f"Tokens {OFF_SUPPORT}."))


def _experts(cards: Sequence[Mapping[str, Any]], views: Sequence[ExpertView]) -> Table:
    table = _table(
        "Experts: share of the routed slots of each stratum; tokens they move most, in nats before the gate",
        ["expert", "high", "low", "raises", "lowers", "acts most before"],
    )
    for card, view in zip(cards, views, strict=True):
        contexts = card["contexts"][:1]
        table.add_row(
            str(card["expert"]),
            f"{card['high']:.1%}",
            f"{card['low']:.1%}",
            *(moved(strongest(side, SHOWN_TOKENS), "{:+.1f}") for side in (view.raised, view.lowered)),
            Text("".join(f"{_tail(moment)} -> {moment['token']['text']!r}" for moment in contexts)),
        )
    return table


def _tail(moment: Mapping[str, Any]) -> str:
    return f"...{moment['before'][-SHOWN_CONTEXT:]}" if moment["before"] else "(start)"
