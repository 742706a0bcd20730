"""`moe-bias train sft`: an adapter from prompts and answers, or from a feature store, by supervised learning.

Started by a launcher (`torchrun --nproc-per-node 2 --no-python moe-bias train sft ...`), the processes
train one layer on the same batches that one would; the first one extracts and writes, the others wait
for the features.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from rich.console import Console

from moe_bias.adapter import save_layer
from moe_bias.backbone import Head
from moe_bias.commands.material import opened
from moe_bias.commands.saved import refuse_overwriting
from moe_bias.config import Interrupted, TrainSFTSettings
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.evaluation.statistics import Estimate, ratio_of_sums
from moe_bias.layer import MoEBiasLayer
from moe_bias.records import provenance, write_json
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.processes import Processes
from moe_bias.training.run_folder import refuse_other_settings
from moe_bias.training.sft import Prepared, fresh_layer, train
from moe_bias.training.trainer import FitReport


def run(settings: TrainSFTSettings) -> None:
    """Trains, measures on held-out examples, and saves adapter and record in `settings.output`.

    Raises UserError on data or settings that cannot be used, and where the folder holds an adapter or
    an unfinished run of other settings; Interrupted on Ctrl-C, saying where the same command goes on.
    """
    refuse_overwriting(settings.output)
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    try:
        _run(settings)
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:
        checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
        raise Interrupted(f"run the same command again to go on {checkpoints.where()}") from interrupt


def _run(settings: TrainSFTSettings) -> None:
    processes = Processes.join(settings.device)
    console = Console(quiet=not processes.is_first)
    with opened(settings, console, processes) as material:
        head, prepared = material.head, material.on(settings.support)
        layer = fresh_layer(settings, prepared.support, head)
        _announce(console, layer, prepared, material.model.num_parameters())
        report = train(layer, prepared.train, prepared.held_out, head, settings, processes)
        if processes.is_first:
            _record(console, layer, prepared, head, report, settings)
            save_layer(layer, settings.output, material.model, prepared.fork_coverage)
            console.print(f"Saved in {settings.output}.")
        processes.wait()


def _announce(console: Console, layer: MoEBiasLayer, prepared: Prepared, model_parameters: int) -> None:
    trainable = layer.config.num_parameters(layer.hidden_size, layer.vocab_size)
    console.print(
        f"{trainable:,} trainable parameters, {trainable / model_parameters:.3%} of the model's {model_parameters:,}; "
        f"{len(prepared.train):,} tokens to train on, {len(prepared.held_out):,} held out"
    )


def _record(
    console: Console,
    layer: MoEBiasLayer,
    prepared: Prepared,
    head: Head,
    report: FitReport,
    settings: TrainSFTSettings,
) -> None:
    """Measures, prints and writes the record; the adapter comes after it, so that none is without its record."""
    base, adapted = (per_example(token_nll(arm, prepared.held_out, head), prepared.held_out) for arm in (None, layer))
    counts = per_example(torch.ones(len(prepared.held_out)), prepared.held_out)
    estimates = {
        "base_nll": ratio_of_sums(base, counts),
        "adapted_nll": ratio_of_sums(adapted, counts),
        "change": ratio_of_sums(adapted - base, counts),
    }
    record = {name: asdict(estimate) for name, estimate in estimates.items()} | {"training": asdict(report)}
    settings_used = settings.model_dump(mode="json")
    write_json(settings.output / "record.json", {"settings": settings_used, "provenance": provenance(), **record})
    if settings.patience:
        console.print(f"Of {report.steps:,} steps, step {report.layer_step:,} was the best on the held-out tokens.")
    for name, estimate in estimates.items():
        console.print(f"held-out {name.replace('_nll', ' NLL per token'):<24} {_interval(estimate)}", highlight=False)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
