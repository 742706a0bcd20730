"""Cells of a sweep and arms on the same tokens: what each was measured to do, and compared.

Units are the held-out examples, and what is measured of them is NLL. The interval is over the held-out text; the spread
over seeds is given apart.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_bias.backbone import Head
from moe_bias.config import SFTConfig
from moe_bias.evaluation.likelihood import token_nll
from moe_bias.evaluation.statistics import Estimate, Floats, ratio_of_sums
from moe_bias.evaluation.strata import STRATA, by_stratum, counts_by_stratum
from moe_bias.experiments.arm import by_name, over_seeds
from moe_bias.features.base_logits import BaseLogits
from moe_bias.layer import MoEBiasLayer
from moe_bias.training.loop import Watching
from moe_bias.training.sft import Prepared, first_tokens, fit, fresh_layer

BASE_MODEL = "base model"
"""The frozen model's own cell."""


@dataclass(frozen=True)
class Cell:
    """One training of a cell. By stratum and example: `nll` summed in nats, and `tokens`.

    `seconds` were spent in training, `forward_seconds` in making its features: the pass of the backbone,
    and the base logits where they are kept.
    """

    name: str
    seed: int
    parameters: int
    train_tokens: int
    seconds: float
    forward_seconds: float
    nll: dict[str, list[float]]
    tokens: dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """A cell over its seeds. By stratum: NLL in nats per token and its paired change against the base cell.

    A stratum that fewer than two examples have tokens of has no interval, and is left out.
    `spread` is the largest NLL of a seed less the smallest; `seconds` the mean over seeds, features
    included.
    """

    name: str
    seeds: int
    parameters: int
    train_tokens: int
    seconds: float
    nll: dict[str, Estimate]
    change: dict[str, Estimate] | None
    spread: float


def run_cell(
    name: str,
    settings: SFTConfig,
    prepared: Prepared,
    head: Head,
    logits: BaseLogits,
    layer: MoEBiasLayer | None = None,
) -> Cell:
    """Trains a layer with the settings' seed and measures it; with patience the best one, on the same tokens.

    `layer` is the fresh one (None: the one of the settings), `logits` are those of the training features.
    """
    watching = Watching(evaluate_every=settings.evaluate_every, patience=settings.patience)
    held_out = prepared.held_out if settings.patience else None
    layer = layer or fresh_layer(settings, prepared.support, head)
    started = time.perf_counter()
    description = f"{name}, seed {settings.seed}"
    report = fit(layer, prepared.train, head, settings, description, watching, held_out, logits)
    seconds = time.perf_counter() - started
    tokens = len(first_tokens(prepared.train, settings.train_tokens))
    trained = min(report.steps * settings.batch_tokens, settings.epochs * tokens)
    made = (prepared.seconds + logits.seconds) * tokens / len(prepared.train)
    return _measured(name, settings.seed, layer, trained, (seconds, made), prepared, head)


def base_cell(prepared: Prepared, head: Head) -> Cell:
    """The frozen model on the same tokens."""
    return _measured(BASE_MODEL, 0, None, 0, (0.0, 0.0), prepared, head)


def _measured(
    name: str,
    seed: int,
    layer: MoEBiasLayer | None,
    trained: int,
    seconds: tuple[float, float],
    prepared: Prepared,
    head: Head,
) -> Cell:
    nll = by_stratum(token_nll(layer, prepared.held_out, head), prepared.held_out)
    return Cell(
        name=name,
        seed=seed,
        parameters=0 if layer is None else sum(parameter.numel() for parameter in layer.parameters()),
        train_tokens=trained,
        seconds=seconds[0],
        forward_seconds=seconds[1],
        nll=as_lists(nll),
        tokens=as_lists(counts_by_stratum(prepared.held_out)),
    )


def as_lists(values: Mapping[str, Floats]) -> dict[str, list[float]]:
    """For a record."""
    return {name: value.tolist() for name, value in values.items()}


def compare_cells(cells: Sequence[Cell], base: str) -> list[Row]:
    """A row per name, in order of appearance, each against the cells named `base`.

    Raises UserError where cells were not measured on the same tokens.
    """
    groups = by_name(cells, lambda cell: cell.tokens, "tokens")
    against = over_seeds([cell.nll for cell in groups[base]])
    return [_row(group, None if name == base else against) for name, group in groups.items()]


def _row(group: Sequence[Cell], against: Mapping[str, Floats] | None) -> Row:
    first, nll = group[0], over_seeds([cell.nll for cell in group])
    totals = [sum(cell.nll["all"]) / sum(cell.tokens["all"]) for cell in group]
    return Row(
        name=first.name,
        seeds=len(group),
        parameters=first.parameters,
        train_tokens=round(float(np.mean([cell.train_tokens for cell in group]))),
        seconds=float(np.mean([cell.seconds + cell.forward_seconds for cell in group])),
        nll=_per_token(nll, first.tokens),
        change=None
        if against is None
        else _per_token({name: nll[name] - against[name] for name in STRATA}, first.tokens),
        spread=max(totals) - min(totals),
    )


def _per_token(sums: Mapping[str, Floats], tokens: Mapping[str, list[float]]) -> dict[str, Estimate]:
    """By stratum; resampled are the examples with tokens of it, so that no draw is without any."""
    held = {name: np.array(tokens[name]) > 0 for name in STRATA}
    return {
        name: ratio_of_sums(sums[name][held[name]], np.array(tokens[name])[held[name]])
        for name in STRATA
        if held[name].sum() > 1
    }
