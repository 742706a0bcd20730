"""`moe-bias train sft`: an adapter by supervised learning, from prompts and answers to a saved folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from moe_bias.adapter.saved import refuse_overwriting
from moe_bias.api.reports import SFTReport
from moe_bias.api.right_answers import RightAnswers
from moe_bias.api.supervised import Extra, save_run, train_on
from moe_bias.commands.material import opened
from moe_bias.commands.training_settings import TrainSFTSettings
from moe_bias.evaluation.samples import BASE
from moe_bias.evaluation.statistics import with_interval
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import Interrupted
from moe_bias.progress import say, text_console
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.objectives import make_objective
from moe_bias.training.processes import Processes
from moe_bias.training.run_folder import refuse_other_settings
from moe_bias.training.sft import Prepared, fresh_layer


def run(settings: TrainSFTSettings) -> None:
    """Trains, measures on held-out examples, and saves adapter and record in `settings.output`.

    Raises UserError on data or settings that cannot be used, and where the folder holds an adapter or
    an unfinished run of other settings; Interrupted on Ctrl-C, saying where the same command goes on.
    """
    made_with = settings.model_dump(mode="json")
    refuse_overwriting(settings.output)
    refuse_other_settings(settings.output, made_with)
    checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
    try:
        _run(settings, made_with, checkpoints)
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:  # before the first step
        raise checkpoints.interrupted() from interrupt


def _run(settings: TrainSFTSettings, made_with: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    processes = Processes.join(settings.device)
    console = text_console(quiet=not processes.is_first)
    objective = make_objective(settings.objective)
    answers = answers_of(settings)
    if answers is not None:
        say(console, f"{answers.summary()}; measure the adapter on other problems")
    texts, pairs = None if answers is None else answers.texts, objective is not None and objective.unit == "pair"
    with opened(settings, console, processes, texts, pairs) as data:
        prepared = data.on(settings.support)
        layer = fresh_layer(settings, prepared.support, data.base.head)
        _announce(console, layer, prepared, data.base.model.num_parameters())
        report = train_on(
            data, prepared, layer, settings, checkpoints, made_with, processes, Extra(objective=objective)
        )
        if processes.is_first:
            _print(console, report, settings)
            more = {} if answers is None else {"samples": answers.record()}
            save_run(settings.output, layer, report, data, prepared, made_with, more)
            console.print(f"Saved in {settings.output}.")
        processes.wait()


def answers_of(settings: TrainSFTSettings) -> RightAnswers | None:
    """The samples to learn from, where there are any."""
    if settings.samples is None:
        return None
    return RightAnswers.of_folder(settings.samples, settings.samples_of or BASE, settings.samples_take)


def _announce(console: Console, layer: MoEBiasLayer, prepared: Prepared, model_parameters: int) -> None:
    trainable = layer.config.num_parameters(layer.hidden_size, layer.vocab_size)
    console.print(
        f"{trainable:,} trainable parameters, {trainable / model_parameters:.3%} of the model's {model_parameters:,}; "
        f"{len(prepared.train):,} tokens to train on, {len(prepared.held_out):,} held out"
    )


def _print(console: Console, report: SFTReport, settings: TrainSFTSettings) -> None:
    if settings.patience:
        console.print(f"Of {report.steps:,} steps, step {report.layer_step:,} was the best on the held-out tokens.")
    for name, estimate in (
        ("base NLL per token", report.base_nll),
        ("adapted NLL per token", report.adapted_nll),
        ("change", report.change),
    ):
        console.print(f"held-out {name:<24} {with_interval(estimate, '{:.4f}')}", highlight=False)
    if report.change.low > 0 and report.preferred is None:
        remedy = "--patience 2 keeps its best step; or take fewer --epochs"
        console.print(f"Held-out answers became less likely, it over-fits: {remedy}.", soft_wrap=True)
