"""Supervised training of a layer on stored hidden states, from Python and for `moe-bias train sft`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from moe_bias.adapter import save_layer
from moe_bias.api.arguments import config_of, refuse_other_base, refuse_other_layer
from moe_bias.api.data import refuse_other_data
from moe_bias.api.reports import SFTReport
from moe_bias.api.run_place import folder_of_adapter
from moe_bias.config import SFTConfig
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.evaluation.statistics import Estimate, ratio_of_sums, share
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.data import Data
from moe_bias.training.loop import Callback
from moe_bias.training.metrics import read_metrics
from moe_bias.training.objectives import Objective, make_objective
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.sft import Prepared, fresh_layer, refuse_impossible, train

Trained = TypeVar("Trained", bound=SFTConfig)


def train_sft(
    base: Frozen,
    data: Data,
    config: SFTConfig | None = None,
    *,
    layer: MoEBiasLayer | None = None,
    objective: Objective | str | None = None,
    callbacks: Sequence[Callback] = (),
    output: str | Path | None = None,
    checkpoint_every: int = 200,
    keep_checkpoints: int = 2,
) -> tuple[MoEBiasLayer, SFTReport]:
    """Trains a layer on the answers of the data; returns it with what it does to those that are held out.

    The layer is a fresh one of the config's choices, on the data's support where the config names none; or a copy of
    `layer`, trained on. `objective` is what is minimised, itself or by name (None: `Supervised` with the config's
    `kl_weight`); each of the `callbacks` is told of every step, and may end the run. In `output` the run leaves metrics
    and checkpoints, from which the same call goes on after an interrupt, to the same bytes; and at its end the adapter
    with its record. Without it nothing stays.

    Raises UserError on data of another model, on a config that cannot be, where `output` holds an adapter or a run of
    other settings, and where the loss is not finite; Interrupted on Ctrl-C, saying where the same call goes on.
    """
    refuse_other_base(base)
    refuse_other_data(data, base)
    config, minimised = config_of(config, SFTConfig), make_objective(objective)
    if layer is not None:
        refuse_other_layer(layer, base)
    if data.pairs and getattr(minimised, "unit", "token") != "pair":
        raise UserError(
            "`data` holds pairs of a chosen and a rejected answer, and this objective would learn both; give "
            "objective=moe_bias.DPO()"
        )
    config = on_own_support(data, config)
    made_with = config.model_dump(mode="json")
    refuse_impossible(config, base.head, len(data.store))
    with folder_of_adapter(output, "sft", made_with) as folder:
        checkpoints = Checkpoints(folder, checkpoint_every, keep_checkpoints)
        prepared = prepared_for(data, config, layer)
        own = fresh_layer(config, prepared.support, base.head) if layer is None else copy.deepcopy(layer)
        extra = Extra(layer is None, minimised, callbacks)
        report = train_on(data, prepared, own, config, checkpoints, made_with, extra=extra)
        if output is not None:
            save_run(folder, own, report, data, prepared, made_with)
    return own, report


def on_own_support(data: Data, config: Trained) -> Trained:
    """The config with the data's support, where it names none."""
    if "support" in config.model_fields_set:
        return config
    return config.model_copy(update={"support": data.made_on})


@dataclass(frozen=True)
class Extra:
    """What Python may give to a training and the command cannot: a layer that is not fresh, an objective, callbacks."""

    is_fresh: bool = True
    objective: Objective | None = None
    callbacks: Sequence[Callback] = ()


def prepared_for(data: Data, config: SFTConfig, layer: MoEBiasLayer | None = None) -> Prepared:
    """The data on the support of the layer, where it has one already, else on that of the config."""
    if layer is not None:
        return data.on("all" if layer.support_ids is None else layer.support_ids.tolist())
    return data.prepared if config.support == data.made_on else data.on(config.support)


def train_on(
    data: Data,
    prepared: Prepared,
    layer: MoEBiasLayer,
    config: SFTConfig,
    checkpoints: Checkpoints,
    made_with: Mapping[str, Any],
    processes: Processes = ALONE,
    extra: Extra | None = None,
) -> SFTReport:
    """Trains the layer in place in the folder of the checkpoints, and measures it."""
    extra = extra or Extra()
    try:
        fitted = train(
            layer,
            prepared.train,
            prepared.held_out,
            data.base.head,
            config,
            checkpoints,
            made_with,
            processes,
            extra.is_fresh,
            extra.objective,
            extra.callbacks,
        )
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:
        raise checkpoints.interrupted() from interrupt
    return SFTReport(
        **_measured(layer, prepared, data, pairs=extra.objective is not None and extra.objective.unit == "pair"),
        steps=fitted.steps,
        layer_step=fitted.layer_step,
        layer_nll=fitted.held_out_nll,
        parameters=layer.config.num_parameters(layer.hidden_size, layer.vocab_size),
        train_tokens=len(prepared.train),
        held_out_tokens=len(prepared.held_out),
        curve=read_metrics(checkpoints.run),
    )


def save_run(
    folder: Path,
    layer: MoEBiasLayer,
    report: SFTReport,
    data: Data,
    prepared: Prepared,
    made_with: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes the record, `more` in it, and then the adapter, so that none is without its record."""
    record = {
        "kind": RecordKind.SUPERVISED,
        "settings": made_with,
        "provenance": provenance(),
        **{name: asdict(getattr(report, name)) for name in ("base_nll", "adapted_nll", "change")},
        "training": {
            "steps": report.steps,
            "layer_step": report.layer_step,
            "held_out_nll": report.layer_nll,
        },
    }
    write_json(folder / "record.json", record | dict(more or {}))
    save_layer(layer, folder, data.base.model, prepared.fork_coverage)


def _measured(layer: MoEBiasLayer, prepared: Prepared, data: Data, pairs: bool) -> dict[str, Estimate]:
    """NLL of the held-out answers; of `pairs` that of the chosen ones, and how often they gained more."""
    held_out, head = prepared.held_out, data.base.head
    of_tokens = (token_nll(None, held_out, head), token_nll(layer, held_out, head), torch.ones(len(held_out)))
    of_answers = np.stack([per_example(values_T, held_out) for values_T in of_tokens])
    preferred = {}
    if pairs:
        gained = of_answers[0] - of_answers[1]
        preferred = {"preferred": share((gained[0::2] > gained[1::2]).astype(np.float64))}
        of_answers[:, 1::2] = 0
    base, adapted, counts = (data.by_unit(sums) for sums in of_answers)
    return preferred | {
        "base_nll": ratio_of_sums(base, counts),
        "adapted_nll": ratio_of_sums(adapted, counts),
        "change": ratio_of_sums(adapted - base, counts),
    }
