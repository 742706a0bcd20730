"""`--dry-run`: what a run would hold, against the memory there is, how much it would do, and how long that takes.

Sizes follow from the model's config. Where the model can be loaded, the hours follow from a trial of a second or so on
this machine; where not, the reason is said and there are none. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from moe_bias.adapter.saved import read_saved
from moe_bias.api.data import Texts
from moe_bias.commands.draft_settings import TrainDraftSettings
from moe_bias.commands.dry_compare import compare
from moe_bias.commands.dry_draft import draft
from moe_bias.commands.dry_subject import UNKNOWN_PROMPT, Subject, say_held, say_model, say_untried
from moe_bias.commands.material import texts_named
from moe_bias.commands.train_sft import answers_of
from moe_bias.commands.training_settings import CompareSettings, ExtractSettings, TrainRLSettings, TrainSFTSettings
from moe_bias.commands.trial import forward_rate, sampling_rate, training_rate
from moe_bias.config import OWN_SUPPORT
from moe_bias.features.examples import encoded, length_limit
from moe_bias.features.manifest import read_manifest
from moe_bias.frozen import cache_folder
from moe_bias.limits import in_time
from moe_bias.progress import say, text_console
from moe_bias.tasks.columns import read_conversations
from moe_bias.training.budget import (
    ModelSize,
    PolicyBudget,
    Sampling,
    StoreBudget,
    SupervisedBudget,
    Text,
    layer_of,
)
from moe_bias.training.objectives import make_objective
from moe_bias.training.problems import TaskData, task_data, task_of


def run(settings: TrainSFTSettings | TrainRLSettings | TrainDraftSettings | ExtractSettings | CompareSettings) -> None:
    """Prints it all. Raises UserError on a model and on data that the run would refuse before it begins."""
    console = text_console(highlight=False, soft_wrap=True)
    if isinstance(settings, TrainRLSettings):
        _policy(console, settings)
    elif isinstance(settings, ExtractSettings):
        _extraction(console, settings)
    elif isinstance(settings, CompareSettings):
        compare(console, settings)
    elif isinstance(settings, TrainDraftSettings):
        draft(console, settings)
    else:
        _supervised(console, settings)


def _policy(console: Console, settings: TrainRLSettings) -> None:
    task = task_of(settings)
    problems = task.problems(settings.train_problems + settings.test_problems, settings.seed)
    subject = Subject.of(settings)
    data = None if subject.base is None else task_data(subject.base, task, problems, settings.train_problems)
    prompts = [] if data is None else [*data.train.prompts, *data.test.prompts]
    budget = policy_budget(settings, subject.size, max(map(len, prompts), default=UNKNOWN_PROMPT))
    say_model(console, subject, budget.layer)
    _say_step(console, budget, is_known=data is not None)
    say_held(console, list(budget.held()), subject.device, settings.output)
    refusal = budget.refusal()
    if refusal is not None:
        say(console, f"The first step would be refused: {refusal}.")
    _say_hours(console, settings, subject, budget, data)


def policy_budget(settings: TrainRLSettings, size: ModelSize, prompt_tokens: int) -> PolicyBudget:
    """What `train rl` with these settings holds and does. Raises UserError on a bad adapter or support."""
    if settings.adapter is None:
        layer = layer_of(settings, size.vocab_size)
    else:
        layer = read_saved(settings.adapter)[0].layer_config()
    sampling = Sampling()
    if settings.engine == "vllm":
        sampling = Sampling("server") if settings.endpoint else Sampling("vllm", int(settings.engine_memory))
    return PolicyBudget(
        size=size,
        settings=settings,
        layer=layer,
        prompt_tokens=prompt_tokens,
        test_problems=settings.test_problems,
        evaluate_every=settings.evaluate_every,
        sampling=sampling,
        is_fresh=settings.adapter is None,
    )


def _say_step(console: Console, budget: PolicyBudget, is_known: bool) -> None:
    settings = budget.settings
    say(
        console,
        f"A step samples up to {budget.step_tokens:,} tokens, {settings.prompts:,} problems x {settings.group:,} "
        f"answers x {settings.max_new_tokens:,}, and learns from {budget.selected_tokens:,} of them; "
        f"{settings.steps:,} steps. The longest prompt {'has' if is_known else 'is taken to have'} "
        f"{budget.prompt_tokens:,} tokens.",
    )


def _say_hours(
    console: Console, settings: TrainRLSettings, subject: Subject, budget: PolicyBudget, data: TaskData | None
) -> None:
    if data is None:
        say_untried(console, subject)
    elif settings.engine == "vllm":
        say(console, "vLLM samples, which is not tried here: no hours are expected.")
    else:
        rate = sampling_rate(data, settings, budget.layer)
        step = budget.step_tokens / rate.answers
        others = (budget.calibration_tokens + budget.measured_tokens) / rate.answers
        say(
            console,
            f"{rate.answers:,.0f} tokens a second were sampled, in {rate.rows:,} rows. If every answer is as long as "
            f"it may be, a step takes {in_time(step)}, all steps {in_time(settings.steps * step)}, and the answers "
            f"before, between and after them {in_time(others)}.",
        )


def _extraction(console: Console, settings: ExtractSettings) -> None:
    conversations = read_conversations(settings.data, settings.split, settings.train_on)
    subject = Subject.of(settings.model_copy(update={"dtype": "auto"}))
    limit = length_limit(subject, settings.max_length)
    whole = encoded(conversations, subject.tokenizer, limit, settings.data, console)
    number, parts = settings.part
    examples = whole.examples[number - 1 :: parts]
    dtype = subject.size.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    text = Text.of(examples)
    say_model(console, subject, None)
    say(console, f"{text.tokens:,} completion tokens, {text.through:,} through the model with their prompts.")
    held = list(StoreBudget(subject.size, text, dtype, settings.keep_top or 1.0).held())
    say_held(console, held, subject.device, settings.output)
    if subject.base is None:
        say_untried(console, subject)
        return
    rate = forward_rate(subject.base, examples)
    say(console, f"{rate:,.0f} tokens a second went through the model: all take {in_time(text.through / rate)}.")


def _supervised(console: Console, settings: TrainSFTSettings) -> None:
    subject = Subject.of(settings)
    if settings.store:
        _on_a_store(console, settings, settings.store, subject)
        return
    texts = _texts_of(settings)
    corpus = encoded(
        texts.conversations,
        subject.tokenizer,
        length_limit(subject, settings.max_length),
        texts.source,
        console,
    )
    held_out = set(texts.held_out(corpus.rows, settings.held_out, settings.seed))
    pairs = zip(corpus.rows, corpus.examples, strict=True)
    tokens, text = (
        sum(len(example.completion_ids) for row, example in pairs if row not in held_out),
        Text.of(corpus.examples),
    )
    layer = layer_of(settings, subject.size.vocab_size)
    store = StoreBudget(subject.size, text, subject.size.dtype)
    budget = SupervisedBudget(store, settings, layer, min(tokens, settings.train_tokens or tokens))
    say_model(console, subject, layer)
    _say_passes(console, budget)
    say_held(console, list(budget.held()), subject.device, settings.features or cache_folder())
    if subject.base is None:
        say_untried(console, subject)
        return
    forward = forward_rate(subject.base, corpus.examples)
    training = training_rate(subject.base, corpus.examples, settings, layer)
    once, passes = in_time(text.through / forward), in_time(budget.seen_tokens / training)
    say(
        console,
        f"{forward:,.0f} tokens a second went through the model, {training:,.0f} through training: the one pass "
        f"through the model takes {once}, training {passes}.",
    )


def _texts_of(settings: TrainSFTSettings) -> Texts:
    answers = answers_of(settings)
    if answers is not None:
        return answers.texts
    objective = make_objective(settings.objective)
    return texts_named(settings, objective is not None and objective.unit == "pair")


def _on_a_store(console: Console, settings: TrainSFTSettings, folders: Sequence[str], subject: Subject) -> None:
    """What is on the disk already is neither computed nor counted."""
    manifests = [read_manifest(Path(folder)) for folder in folders]
    tokens = round(sum(manifest.tokens for manifest in manifests) * (1 - settings.held_out))
    layer = settings.layer_config(manifests[0].support)
    if settings.support != OWN_SUPPORT:
        layer = layer_of(settings, subject.size.vocab_size)
    store = StoreBudget(subject.size, Text(0, 0), subject.size.dtype)
    budget = SupervisedBudget(store, settings, layer, min(tokens, settings.train_tokens or tokens))
    say_model(console, subject, layer)
    _say_passes(console, budget)
    say_held(console, list(budget.held()), subject.device, None)
    say(console, "Training on a store begins at once and shows its speed: it is not tried here.")


def _say_passes(console: Console, budget: SupervisedBudget) -> None:
    settings, text = budget.settings, budget.store.text
    through = f" {text.through:,} tokens go through the model once, prompts counted." if text.through else ""
    say(
        console,
        f"About {budget.train_tokens:,} tokens to train on, {settings.epochs:,} times, {settings.batch_tokens:,} a "
        f"step.{through}",
    )
