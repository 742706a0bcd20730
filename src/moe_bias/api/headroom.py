"""What a layer at the output could gain on the answers of some data, before it is trained."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from moe_bias.api.arguments import config_of, refuse_other_base
from moe_bias.api.data import refuse_other_data
from moe_bias.api.reports import WIDTH, Curve, Report
from moe_bias.config import OWN_SUPPORT, SFTConfig
from moe_bias.evaluation.statistics import Estimate, with_interval
from moe_bias.experiments.headroom import (
    BASE,
    LAYER,
    TRAIN_TOKENS,
    Findings,
    Options,
    Probe,
    measure,
    prepared_ground,
    refuse_too_few,
)
from moe_bias.experiments.learning_curve import SATURATED_NATS, Forecast
from moe_bias.frozen import Frozen
from moe_bias.mistakes import UserError, read_json
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.report.table import Table
from moe_bias.report.tables import probes
from moe_bias.training.data import Data
from moe_bias.training.sft import refuse_impossible, stored_parts

RECORD_FILE = "record.json"
LOGITS_BUDGET = 2**31
"""Bytes for base logits where the config names none: those of the held-out tokens are read ten times here."""


@dataclass(frozen=True, repr=False)
class Headroom(Report):
    """How much of the held-out loss a layer at the output could remove; `str` is one sentence, then a table.

    `findings` has all of it: the `probes`, of which `best` is the estimate of what a function of the last hidden state
    reaches, a lower bound of the ceiling; the `curve` of losses by training tokens, and the `forecast` from it; the
    `coverage` of the held-out targets by the support and by the base's top tokens.
    """

    findings: Findings
    curve: Curve = field(default=(), compare=False)

    @property
    def title(self) -> str:
        """The verdict."""
        found = self.findings
        base, best = _probe(found, BASE), found.best and found.probe(found.best)
        if not best:
            return f"The base's held-out NLL is {base.nll['all'].value:.3f} nats per token; no probe was begun in time"
        return f"{_gain(base, best, found)}; {_outlook(found.forecast, found.train_tokens)}"

    @property
    def notes(self) -> list[str]:
        """Two sentences below the table: where the loss is, and what is not known of the rest of it."""
        found, held = self.findings, self.findings.coverage
        where = (
            f"{held.support:.1%} of the {found.held_out_tokens:,} held-out targets are in the support. The fifth "
            f"of highest entropy has {held.high_share:.0%} of the loss, {held.top_at_forks:.0%} of it are among the "
            f"base's top {found.top} of the support; targets outside those have {held.nll_outside:.3f} nats per token."
        )
        best = found.best and found.probe(found.best)
        left = f"the {best.nll['all'].value:.3f} nats" if best else "what"
        rest = (
            f"Of {left} that no probe takes it is not told what is chance in the text, what more tokens would bring, "
            "and what needs the backbone; probes are lower bounds. Training LoRA tells, as moe-bias arms does."
        )
        return [where, rest]

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *(line for note in self.notes for line in wrap(note, WIDTH))])

    def _repr_html_(self) -> str:
        """The table and the curve, then the notes."""
        return super()._repr_html_() + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)

    @property
    def table(self) -> Table:
        """A row for each probe, and for what more tokens are expected to bring to the layer."""
        shown = ("probe", "held-out NLL", "change", "of high entropy", "right there, %")
        return replace(probes(self.record()).only(*shown), caption="")

    def record(self) -> dict[str, Any]:
        """What the record holds beside settings and provenance."""
        return {"kind": RecordKind.HEADROOM, "verdict": self.title, "notes": self.notes, **asdict(self.findings)}


def headroom(
    base: Frozen,
    data: Data,
    config: SFTConfig | None = None,
    *,
    top: int = 20,
    time_limit: float = 300.0,
    output: str | Path | None = None,
) -> Headroom:
    """How much of the held-out loss a layer at the output could remove, and with how many tokens: see `Headroom`.

    Trains small probes on the stored hidden states (one static bias, the layer of the config, a two-layer network in
    its place, one that chooses among the base's `top` tokens), stops each by a part of the training examples, and
    measures them on the held-out ones. The layer is trained on parts of the tokens too, for the curve. The backbone is
    not run, and no adapter is made. `config` is what `train_sft` would be given; examples of `train_tokens` together
    are drawn with its seed, 50,000 where it names none. After `time_limit` seconds no probe is begun; the findings name
    what is left out. Where nothing is, the same call gives the same figures. In `output` a record is left,
    `record.json`.

    Raises UserError on data of another model, of pairs, or of too few tokens, on a config that cannot be, and where
    `output` holds a record of something else.
    """
    refuse_other_base(base)
    refuse_other_data(data, base)
    config, options = config_of(config, SFTConfig), Options(top, time_limit)
    if data.pairs:
        raise UserError("`data` holds pairs of a chosen and a rejected answer; give the chosen ones alone, as rows")
    if top < 2:
        raise UserError(f"`top` is {top}; a choice needs at least 2 tokens")
    if not time_limit > 0:
        raise UserError(f"`time_limit` is {time_limit:g}; give seconds above 0")
    if "support" not in config.model_fields_set:
        config = config.model_copy(update={"support": data.made_on})
    made_with = config.model_dump(mode="json") | {"top": top, "time_limit": time_limit}
    return measured(data, config, options, made_with, None if output is None else Path(output))


def measured(
    data: Data, config: SFTConfig, options: Options, made_with: Mapping[str, Any], output: Path | None
) -> Headroom:
    """The findings on the data; with `output` their record is left there, with the settings `made_with`."""
    refuse_other_record(output)
    refuse_impossible(config, data.base.head, min(len(data.store), config.train_tokens or TRAIN_TOKENS))
    refuse_too_few(len(data.store), config.train_tokens)
    if "logits_budget" not in config.model_fields_set:
        config = config.model_copy(update={"logits_budget": LOGITS_BUDGET})
    support = OWN_SUPPORT if config.support == data.made_on else config.support
    train, held_out, _ = stored_parts(data.store, data.base.head, data.held_out, support, data.always)
    ground = prepared_ground(train, held_out, data.base.head, config, data.by_unit)
    findings = measure(ground, options, len(train))
    points = [{"tokens": float(point.tokens), "held_out_nll": point.nll} for point in findings.curve]
    report = Headroom(findings, points)
    if output is not None:
        write_json(
            output / RECORD_FILE,
            report.record() | {"settings": dict(made_with), "provenance": provenance()},
        )
    return report


def refuse_other_record(output: Path | None) -> None:
    """Raises UserError where the folder holds a record of something else; one of headroom is replaced."""
    if output is None or not (output / RECORD_FILE).is_file():
        return
    found = read_json(output / RECORD_FILE, "record")
    if not isinstance(found, dict) or found.get("kind") != RecordKind.HEADROOM:
        raise UserError(f"`output` {str(output)!r} holds the record of another run; name another folder")


def _probe(found: Findings, name: str) -> Probe:
    probe = found.probe(name)
    assert probe is not None
    return probe


def _gain(base: Probe, best: Probe, found: Findings) -> str:
    """What the best probe takes of the base's loss, and what the layer does."""
    nll, change = base.nll["all"].value, best.change["all"]
    if change.high >= 0:
        return (
            f"Of {nll:.3f} nats per token no probe takes anything for sure on {found.train_tokens:,} tokens "
            f"({best.name}: {_signed(change)})"
        )
    layer = found.probe(LAYER)
    own = "" if layer is None or layer is best else f", the layer {-layer.change['all'].value:.3f}"
    return (
        f"Of {nll:.3f} nats per token a function of the last hidden state takes at least {-change.value:.3f} "
        f"[{-change.high:.3f}, {-change.low:.3f}] ({-change.value / nll:.0%}) after {found.train_tokens:,} tokens "
        f"({best.name}){own}"
    )


def _outlook(seen: Forecast, tokens: int) -> str:
    """What more tokens bring to the layer."""
    if not seen.nll:
        return f"what more tokens bring cannot be told ({seen.reason})"
    furthest = max(seen.nll)
    expected = f"the layer is expected at {_plain(seen.nll[furthest])} with {furthest:,}"
    if seen.saturation is not None:
        at = seen.saturation
        when = (
            f"saturates by {_rounded(max(at.value, tokens))} tokens"
            if at.high <= tokens
            else f"saturates at about {_rounded(at.value)} tokens [{_rounded(at.low)}, {_rounded(at.high)}]"
        )
    elif seen.not_before is not None:
        when = f"does not saturate before {_rounded(seen.not_before)}"
    else:
        when = "where it saturates cannot be told"
    return f"{expected}, and {when} (twice as many then gain below {SATURATED_NATS:g})"


def _rounded(tokens: float) -> str:
    """Two digits are more than is known."""
    return f"{float(f'{tokens:.1e}'):,.0f}"


def _plain(value: Estimate) -> str:
    return with_interval(value, "{:.3f}")


def _signed(value: Estimate) -> str:
    return with_interval(value, "{:+.3f}")
