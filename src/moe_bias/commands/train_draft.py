"""`moe-bias train draft`: an adapter that brings a small model nearer to a larger one, whose draft it is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from moe_bias.adapter.saved import refuse_overwriting
from moe_bias.api.data import Extraction, Texts, of_texts
from moe_bias.api.drafts import (
    Towards,
    refuse_other_vocabulary,
    save_draft,
    target_store,
    train_towards,
)
from moe_bias.api.own_answers import OwnAnswers, sampled_texts
from moe_bias.api.reports import DraftReport
from moe_bias.api.supervised import Extra, prepared_for
from moe_bias.commands.draft_settings import TrainDraftSettings
from moe_bias.commands.material import keep, stored, texts_named
from moe_bias.evaluation.statistics import percent, with_interval
from moe_bias.frozen import Frozen, frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.progress import say, text_console
from moe_bias.rollout.answers import AnswerChoices
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.data import Data
from moe_bias.training.problems import saved_layer
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.run_folder import refuse_other_settings
from moe_bias.training.sft import fresh_layer, refuse_impossible


def run(settings: TrainDraftSettings) -> None:
    """Trains, measures on held-out answers, and saves adapter and record in `settings.output`.

    Raises UserError on models, data or settings that cannot be used, and where the folder holds an adapter or an
    unfinished run of other settings; Interrupted on Ctrl-C, saying where the same command goes on.
    """
    made_with = settings.model_dump(mode="json")
    refuse_overwriting(settings.output)
    refuse_other_settings(settings.output, made_with)
    if Processes.join(settings.device).count > 1:
        raise UserError("`train draft` runs in one process; start it without a launcher")
    checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
    try:
        with ExitStack() as stack:
            _run(settings, made_with, checkpoints, stack)
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:  # before the first step
        raise checkpoints.interrupted() from interrupt


def _run(
    settings: TrainDraftSettings, made_with: Mapping[str, Any], checkpoints: Checkpoints, stack: ExitStack
) -> None:
    console = text_console(highlight=False, soft_wrap=True)
    texts = texts_named(settings)
    small = frozen(settings)
    large = frozen(settings.model_copy(update={"model": settings.target}))
    refuse_other_vocabulary(small.tokenizer, large.tokenizer)
    given = None if settings.adapter is None else saved_layer(settings.adapter, small.head).layer
    data = _data(settings, small, large, texts, given, console)
    stack.callback(data.close)
    kept = settings.keep_features if settings.target_features is None else settings.target_features
    target = target_store(large, data, kept, settings.batch_size, stack, ALONE, console)
    towards = Towards.of(large, data, prepared_for(data, settings, given), target)
    layer = fresh_layer(settings, towards.prepared.support, small.head) if given is None else given
    _announce(console, layer, towards, small)
    report = train_towards(towards, layer, settings, checkpoints, made_with, extra=Extra(given is None))
    _print(console, report)
    save_draft(settings.output, layer, report, towards, made_with)
    console.print(f"Saved in {settings.output}.")


def _data(
    settings: TrainDraftSettings,
    small: Frozen,
    large: Frozen,
    texts: Texts,
    layer: MoEBiasLayer | None,
    console: Console,
) -> Data:
    """The draft's features of the texts, or of answers that target or draft give to their prompts."""
    if settings.store:
        return stored(settings, settings.store, console, ALONE, small)
    if settings.own_samples:
        texts = _sampled(settings, small, large, texts, layer, console).texts
    held_out, seed, support = settings.held_out, settings.seed, settings.support
    how = Extraction(held_out, seed, support, keep(settings), settings.max_length, settings.batch_size)
    return of_texts(small, texts, how, ALONE, console, lambda tokens: refuse_impossible(settings, small.head, tokens))


def _sampled(
    settings: TrainDraftSettings,
    small: Frozen,
    large: Frozen,
    texts: Texts,
    layer: MoEBiasLayer | None,
    console: Console,
) -> OwnAnswers:
    base, layer = (large, None) if settings.own_samples == "target" else (small, layer)
    choices = AnswerChoices(1, settings.temperature, 1.0, settings.max_new_tokens, [])
    found = sampled_texts(base, texts, layer, choices, settings.seed, settings.batch_size, settings.output, console)
    answers = len(found.texts.conversations)
    say(console, f"{answers:,} answers of the {settings.own_samples}, {found.cut:,} of them cut at the token limit")
    return found


def _announce(console: Console, layer: MoEBiasLayer, towards: Towards, small: Frozen) -> None:
    trainable, whole = layer.config.num_parameters(layer.hidden_size, layer.vocab_size), small.model.num_parameters()
    prepared = towards.prepared
    console.print(
        f"{trainable:,} trainable parameters, {trainable / whole:.3%} of the draft's {whole:,}; "
        f"{len(prepared.train):,} tokens to train on, {len(prepared.held_out):,} held out; the support holds "
        f"{towards.support_mass:.1%} of the target's probability"
    )


def _print(console: Console, report: DraftReport) -> None:
    for name, figures in report.figures.items():
        console.print(
            f"held-out {name:<8} {percent(figures.accepted)}% accepted, {with_interval(figures.tokens, '{:.2f}')} "
            f"tokens a pass, KL from the target {with_interval(figures.kl, '{:.3f}')} nats"
        )
    console.print(f"{report.title}.")
