"""What a report says of an analysis: what changes at high- and at low-entropy tokens, routing, experts, flips.

`moe_bias.analysis.record` says what the record holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moe_bias.analysis import ExpertView, Reading, any_off_support, strongest, view_of_record
from moe_bias.analysis.answers import BASE
from moe_bias.evaluation.statistics import estimate_of, percent
from moe_bias.report import figures
from moe_bias.report.content import (
    Block,
    Card,
    Cards,
    Note,
    Part,
    Plot,
    Topic,
    slug,
)
from moe_bias.report.record import Record
from moe_bias.report.table import Table
from moe_bias.report.tables import flips, in_context, right_answers, strata

FLIPS = 12
TOKENS, READ_TOKENS, CONTEXTS = 6, 4, 3
"""Shown of a record: flips, and on a card tokens of each side, those of what it reads, and
contexts."""


def analysis(record: Record) -> Iterator[Block]:
    """Every adapter of the record, each under its own name where there are several."""
    adapters = record.content["adapters"]
    for number, adapter in enumerate(adapters):
        one = _Adapter(
            record, adapter, record.name if len(adapters) == 1 else f"{record.name}: {adapter['name']}", number
        )
        if adapter["answers"]:
            yield Block(Topic.RESULT, one.run, [_accuracy(one)])
            yield Block(Topic.ACCURACY, one.run, [right_answers(adapter["answers"], one.file("answers"))])
        yield Block(Topic.ENTROPY, one.run, list(_entropy(one)))
        yield Block(Topic.ROUTING, one.run, list(_routing(one)))
        yield Block(Topic.EXPERTS, one.run, [_cards(one)])
        parts = [*_flips(one), *_turning_flips(one)]
        if parts:
            yield Block(Topic.FLIPS, one.run, parts)


class _Adapter:
    """One adapter of a record, the heading of its blocks, and the beginning of its files' names."""

    def __init__(self, record: Record, found: Mapping[str, Any], run: str, number: int) -> None:
        self.record, self.found, self.run = record, found, run
        self._stem = record.name if len(record.content["adapters"]) == 1 else f"{record.name}-{number}"

    def file(self, what: str) -> str:
        return slug(self._stem, what)


def _entropy(one: _Adapter) -> Iterator[Part]:
    text, found = one.record.content["text"], one.found
    flipped = [percent(estimate_of(found["strata"][name]["means"]["flipped"])) for name in ("high", "low")]
    top = f"top {text['rho']:.0%}"
    yield Note(
        f"{text['tokens']:,} tokens of {text['name']} ({text['kind']}); high entropy is the {top}, from "
        f"{text['threshold']:.3f} nats. The likeliest token is another at {flipped[0]}% of the high and {flipped[1]}% "
        f"of the low tokens. Of the base's {top}, {_overlap(found)}% are in the adapted model's too."
    )
    drawn = figures.histogram(
        one.record.content["entropy_edges"], found["histograms"], text["threshold"], "entropy, nats"
    )
    yield Plot(one.file("entropy"), "Tokens by entropy of the base and the adapted model, logarithmic", drawn)
    if found["checkpoints"]:
        yield from _series(one)
    caption = "Means over tokens [95% interval over examples], by the base's entropy"
    yield strata(found, one.file("strata"), caption)


def _overlap(found: Mapping[str, Any]) -> str:
    return percent(estimate_of(found["overlap"]))


def _series(one: _Adapter) -> Iterator[Plot]:
    points = one.found["checkpoints"]
    steps = [point["step"] for point in points]
    for key, unit, scale in (("overlap", "% of the base's top tokens", 100), ("kl", "mean KL to the base, nats", 1)):
        estimates = [estimate_of(point[key]) for point in points]
        drawn = figures.band(steps, estimates, unit, scale)
        title = {"overlap": "Overlap of the high-entropy tokens with the base's", "kl": "Exact KL to the base"}[key]
        yield Plot(one.file(f"{key}-along"), f"{title} at each checkpoint, with 95% intervals", drawn)


def _routing(one: _Adapter) -> Iterator[Part]:
    found, classes = one.found["strata"], one.found["expert_share_by_class"]
    rows = {f"{name} entropy": found[name]["expert_share"] for name in ("high", "low")} | classes
    experts = [str(number) for number in range(one.found["num_experts"])]
    drawn = figures.heat_map(list(rows.values()), list(rows), experts, "expert")
    title = "Share of the routed slots that each expert has, in % of its row: by stratum and by class of token"
    yield Plot(one.file("routing"), title, drawn)
    information = [
        [name, f"{value['nats']:.4f}", f"{value['at_most']:.4f}"]
        for name, value in one.found["mutual_information"].items()
    ]
    caption = "Mutual information between the expert of a routed slot and what is known of the token, in nats"
    yield Table.of_texts(one.file("information"), caption, ["with", "nats", "at most"], information)


def _cards(one: _Adapter) -> Cards:
    cards = [_card(expert) for expert in one.found["experts"]]
    caption = (
        "What each expert raises and lowers most, its bias in nats before the gate; its share of the routed slots of "
        "high- and of low-entropy tokens; tokens at which it has the largest part of the bias, marked in their context."
    )
    if any(card.view.readings for card in cards):
        caption += (
            " Linear experts add to that what they read: hidden states that lean to some tokens raise and lower "
            "others, those that lean away from them do the opposite (- where no token stands out by more than chance); "
            "nats are per unit read."
        )
    if any_off_support(card.view for card in cards):
        caption += " Tokens in brackets are off the support, where the adapter has no bias."
    return Cards(one.file("experts"), caption, cards)


def _card(expert: Mapping[str, Any]) -> Card:
    facts = [("of high-entropy slots", f"{expert['high']:.1%}"), ("of low-entropy slots", f"{expert['low']:.1%}")]
    contexts = [in_context(moment) for moment in expert["contexts"][:CONTEXTS]]
    return Card(expert["expert"], facts, _shortened(view_of_record(expert)), contexts)


def _shortened(view: ExpertView) -> ExpertView:
    raised, lowered = (strongest(side, TOKENS) for side in (view.raised, view.lowered))
    return replace(view, raised=raised, lowered=lowered, readings=[_shortened_reading(one) for one in view.readings])


def _shortened_reading(reading: Reading) -> Reading:
    raised, lowered = (strongest(side, READ_TOKENS) for side in (reading.raised, reading.lowered))
    toward, away = reading.toward[:READ_TOKENS], reading.away[:READ_TOKENS]
    return replace(reading, raised=raised, lowered=lowered, toward=toward, away=away)


def _flips(one: _Adapter) -> Iterator[Part]:
    if shown := one.found["flips"][:FLIPS]:
        caption = f"The {len(shown)} flips of largest KL: where the base and the adapted model go on differently"
        yield flips(shown, caption, one.file("flips"))


def _turning_flips(one: _Adapter) -> Iterator[Part]:
    """Where the answers part whose outcome changed."""
    found = one.found["answers"]["flips"] if one.found["answers"] else []
    if shown := found[:FLIPS]:
        caption = f"The first {len(shown)} of {len(found)} problems whose answer changed, at the flip"
        yield flips(shown, caption, one.file("turning-flips"), folded=True)


def _accuracy(one: _Adapter) -> Plot:
    found = {arm: estimate_of(value) for arm, value in one.found["answers"]["accuracy"].items()}
    rows = sorted(found.items(), key=lambda row: row[0] != BASE)
    drawn = figures.intervals(rows, "% of the problems", "{:.1f}", scale=100)
    text = one.record.content["text"]["name"]
    title = f"Greedy accuracy on {text}: base, adapted, and adapted at one stratum only"
    return Plot(one.file("accuracy"), title, drawn)
