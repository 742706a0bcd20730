"""`moe-bias train sft`: an adapter from prompts and answers, right samples of an evaluation, or a feature store.

Started by a launcher (`torchrun --nproc-per-node 2 --no-python moe-bias train sft ...`), the processes
train one layer on the same batches that one would; the first one extracts and writes, the others wait
for the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from rich.console import Console

from moe_bias.adapter import save_layer
from moe_bias.api.data import Data
from moe_bias.commands.material import opened
from moe_bias.commands.right_answers import RightAnswers
from moe_bias.commands.saved import refuse_overwriting
from moe_bias.commands.training_settings import TrainSFTSettings
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.evaluation.statistics import Estimate, ratio_of_sums
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import Interrupted
from moe_bias.progress import say, text_console
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
    console = text_console(quiet=not processes.is_first)
    answers = None if settings.samples is None else RightAnswers.of(settings.samples, settings.samples_of)
    if answers is not None:
        say(console, f"{answers.summary()}; measure the adapter on other problems")
    with opened(settings, console, processes, None if answers is None else answers.texts) as data:
        head, prepared = data.base.head, data.on(settings.support)
        layer = fresh_layer(settings, prepared.support, head)
        _announce(console, layer, prepared, data.base.model.num_parameters())
        checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
        made_with = settings.model_dump(mode="json")
        report = train(layer, prepared.train, prepared.held_out, head, settings, checkpoints, made_with, processes)
        if processes.is_first:
            measured = _measured(layer, prepared, data)
            _record(console, measured, report, settings, answers)
            save_layer(layer, settings.output, data.base.model, prepared.fork_coverage)
            console.print(f"Saved in {settings.output}.")
        processes.wait()


def _announce(console: Console, layer: MoEBiasLayer, prepared: Prepared, model_parameters: int) -> None:
    trainable = layer.config.num_parameters(layer.hidden_size, layer.vocab_size)
    console.print(
        f"{trainable:,} trainable parameters, {trainable / model_parameters:.3%} of the model's {model_parameters:,}; "
        f"{len(prepared.train):,} tokens to train on, {len(prepared.held_out):,} held out"
    )


def _measured(layer: MoEBiasLayer, prepared: Prepared, data: Data) -> dict[str, Estimate]:
    held_out, head = prepared.held_out, data.base.head
    of_tokens = (token_nll(None, held_out, head), token_nll(layer, held_out, head), torch.ones(len(held_out)))
    base, adapted, counts = (data.by_unit(per_example(values_T, held_out)) for values_T in of_tokens)
    return {
        "base_nll": ratio_of_sums(base, counts),
        "adapted_nll": ratio_of_sums(adapted, counts),
        "change": ratio_of_sums(adapted - base, counts),
    }


def _record(
    console: Console,
    estimates: Mapping[str, Estimate],
    report: FitReport,
    settings: TrainSFTSettings,
    answers: RightAnswers | None,
) -> None:
    """Prints and writes the record; the adapter comes after it, so that none is without its record."""
    record = {name: asdict(estimate) for name, estimate in estimates.items()} | {"training": asdict(report)}
    if answers is not None:
        record["samples"] = answers.record()
    settings_used = settings.model_dump(mode="json")
    write_json(settings.output / "record.json", {"settings": settings_used, "provenance": provenance(), **record})
    if settings.patience:
        console.print(f"Of {report.steps:,} steps, step {report.layer_step:,} was the best on the held-out tokens.")
    for name, estimate in estimates.items():
        console.print(f"held-out {name.replace('_nll', ' NLL per token'):<24} {_interval(estimate)}", highlight=False)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
