"""What a report says of one training: `train sft` and `train rl`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_bias.evaluation.statistics import Estimate, estimate_of, percent, points, with_interval
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

SAMPLES = 8
"""Samples of the last step that were kept are shown so many."""
_NLL = "nats per token"
_POLICY_CURVES = {
    "reward": ("mean reward of a step's samples", "held_out_accuracy"),
    "entropy": ("entropy of the sampling policy, nats", None),
    "kl": ("exact KL to the base on the selected tokens, nats", None),
    "tokens_per_answer": ("tokens per answer", None),
}


def supervised(record: Record) -> Iterator[Block]:
    """The change of held-out NLL, and the curves of training."""
    base, adapted, change = (estimate_of(record.content[name]) for name in ("base_nll", "adapted_nll", "change"))
    verb = "falls" if change.value < 0 else "rises"
    lead = (
        f"Held-out NLL {verb} by {abs(change.value):.3f} nats per token, from {base.value:.3f} to {adapted.value:.3f} "
        f"(change {with_interval(change, '{:+.3f}')}, paired by example; {_verdict(change)})."
    )
    plot = Plot(
        slug(record.name, "nll"),
        "Held-out NLL of the base and the adapted model, with 95% intervals over examples",
        figures.intervals([("base", base), ("adapted", adapted)], _NLL),
    )
    yield Block(Topic.RESULT, record.name, [Note(lead, lead=True), plot])
    if record.metrics:
        yield Block(Topic.TRAINING, record.name, list(_supervised_curves(record)))


def _supervised_curves(record: Record) -> Iterator[Part]:
    training = record.content["training"]
    yield Note(
        f"{training['steps']:,} steps; the adapter is the layer of step {training['layer_step']:,}. Faint: each step; "
        "dark: its running mean."
    )
    losses, held_out = (_line(record.metrics, name) for name in ("nll", "held_out_nll"))
    if losses is not None:
        drawn = figures.smoothed_curve(losses, held_out, ("training", "held out"), "step", f"NLL, {_NLL}")
        yield Plot(slug(record.name, "training-nll"), "NLL of training and held-out tokens over the steps", drawn)
    routing = _line(record.metrics, "router_entropy")
    if routing is not None:
        drawn = figures.smoothed_curve(routing, None, ("router", ""), "step", "entropy of the router, nats")
        yield Plot(slug(record.name, "router-entropy"), "Mean entropy of the router over the steps", drawn)
    gate = {name.removeprefix("gate_"): _line(record.metrics, name) for name in ("gate_alpha", "gate_beta")}
    lines = {name: line for name, line in gate.items() if line is not None}
    if lines:
        drawn = figures.curves(lines, "step", "parameter of the entropy gate")
        yield Plot(slug(record.name, "gate"), "Alpha and beta of the entropy gate over the steps", drawn)


def policy(record: Record) -> Iterator[Block]:
    """Held-out accuracy before and after, curves, and samples of the last step that kept some."""
    accuracy = {name: estimate_of(value) for name, value in record.content["accuracy"].items()}
    change = estimate_of(record.content["change"])
    problems = len(record.content["right"]["trained"])
    lead = (
        f"Greedy answers to {problems:,} held-out problems: {percent(accuracy['trained'])}% right, "
        f"{points(change)} points against the start, paired by problem ({_verdict(change)})."
        f"{_length(record.content)}"
    )
    drawn = figures.intervals(list(accuracy.items()), "% of the held-out problems", "{:.1f}", scale=100)
    plot = Plot(
        slug(record.name, "accuracy"), "Held-out accuracy of base, start and trained policy, 95% intervals", drawn
    )
    yield Block(Topic.RESULT, record.name, [Note(lead, lead=True), plot])
    if record.metrics:
        yield Block(Topic.TRAINING, record.name, list(_policy_curves(record)))
    if record.samples:
        yield Block(Topic.TOKENS, record.name, [_samples(record)])


def _policy_curves(record: Record) -> Iterator[Part]:
    for name, (unit, marked) in _POLICY_CURVES.items():
        line = _line(record.metrics, name)
        if line is not None:
            points = None if marked is None else _line(record.metrics, marked)
            drawn = figures.smoothed_curve(line, points, (name.replace("_", " "), "held-out\naccuracy"), "step", unit)
            yield Plot(slug(record.name, name), f"{unit[0].upper()}{unit[1:]}, over the steps", drawn)


def _samples(record: Record) -> Table:
    last = max(sample["step"] for sample in record.samples)
    shown = [sample for sample in record.samples if sample["step"] == last][:SAMPLES]
    rows = [[s["question"], s["completion"], s["gold"], s["outcome"], f"{s['reward']:.2f}"] for s in shown]
    caption = f"The first {len(shown)} samples that were kept of step {last:,}"
    headings = ["problem", "completion", "gold answer", "outcome", "reward"]
    return Table.of_texts(slug(record.name, "samples"), caption, headings, rows, words=4, folded=True)


def _line(metrics: Sequence[Mapping[str, Any]], name: str) -> figures.Line | None:
    points = [(line["step"], line[name]) for line in metrics if name in line]
    return None if not points else ([step for step, _ in points], [value for _, value in points])


def _length(content: Mapping[str, Any]) -> str:
    """A sentence on how long answers are; none of records of before, which do not know."""
    if "tokens_change" not in content:
        return ""
    start, trained = (estimate_of(content["tokens"][name]).value for name in ("start", "trained"))
    change = with_interval(estimate_of(content["tokens_change"]), "{:+,.0f}")
    return f" An answer takes {trained:,.0f} tokens, {start:,.0f} at the start (change {change})."


def _verdict(change: Estimate) -> str:
    return "the interval excludes zero" if change.excludes_zero else "the interval includes zero"
