"""`--dry-run`: what a run would hold, against the memory there is, how much it would do, and how long that takes.

Sizes follow from the model's config. Where the model can be loaded, the hours follow from a trial of a second or so on
this machine; where not, the reason is said and there are none. Nothing is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from moe_bias.adapter.saved import read_saved
from moe_bias.api.data import Texts
from moe_bias.commands.material import texts_named
from moe_bias.commands.train_sft import answers_of
from moe_bias.commands.training_settings import ExtractSettings, TrainRLSettings, TrainSFTSettings
from moe_bias.commands.trial import forward_rate, sampling_rate, training_rate
from moe_bias.config import OWN_SUPPORT, LayerConfig, ModelConfig
from moe_bias.features.examples import encoded, length_limit
from moe_bias.features.manifest import read_manifest
from moe_bias.frozen import Frozen, cache_folder, frozen, load_tokenizer, model_config, place_of
from moe_bias.limits import in_bytes, in_time, machine_bytes
from moe_bias.mistakes import UserError
from moe_bias.progress import say, text_console
from moe_bias.tasks.columns import read_conversations
from moe_bias.tasks.conversations import Corpus
from moe_bias.training.budget import (
    Held,
    ModelSize,
    Place,
    PolicyBudget,
    Sampling,
    StoreBudget,
    SupervisedBudget,
    Text,
    layer_of,
    peak,
)
from moe_bias.training.objectives import make_objective
from moe_bias.training.problems import TaskData, task_data, task_of

UNKNOWN_PROMPT = 512
"""Tokens that the longest prompt is taken to have where the model is not there to tell."""


def run(settings: TrainSFTSettings | TrainRLSettings | ExtractSettings) -> None:
    """Prints it all. Raises UserError on a model and on data that the run would refuse before it begins."""
    console = text_console(highlight=False, soft_wrap=True)
    if isinstance(settings, TrainRLSettings):
        _policy(console, settings)
    elif isinstance(settings, ExtractSettings):
        _extraction(console, settings)
    else:
        _supervised(console, settings)


@dataclass(frozen=True)
class Subject:
    """A model's config and sizes, where it would be, and the model itself; or why it is not there."""

    settings: ModelConfig
    config: Any
    size: ModelSize
    device: torch.device
    base: Frozen | None
    reason: str

    @classmethod
    def of(cls, settings: ModelConfig) -> Subject:
        """Loads the model where there is room for it. Raises UserError where not even the config can be had."""
        config = model_config(settings)
        device, dtype = place_of(settings, config)
        size = ModelSize.of(config, dtype, settings.trust_remote_code)
        there, base, reason = _memory_of(device), None, ""
        if there is not None and size.weights > there:
            reason = f"its weights take {in_bytes(size.weights)} of {in_bytes(there)}"
        else:
            try:
                base = frozen(settings)
            except UserError as error:
                reason = str(error)
        return cls(settings, config, size, device, base, reason)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, without which no text can be counted. Raises UserError where there is none."""
        return load_tokenizer(self.settings) if self.base is None else self.base.tokenizer


def _policy(console: Console, settings: TrainRLSettings) -> None:
    task = task_of(settings)
    problems = task.problems(settings.train_problems + settings.test_problems, settings.seed)
    subject = Subject.of(settings)
    data = None if subject.base is None else task_data(subject.base, task, problems, settings.train_problems)
    prompts = [] if data is None else [*data.train.prompts, *data.test.prompts]
    budget = policy_budget(settings, subject.size, max(map(len, prompts), default=UNKNOWN_PROMPT))
    _say_model(console, subject, budget.layer)
    _say_step(console, budget, is_known=data is not None)
    _say_held(console, list(budget.held()), subject.device, settings.output)
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
        _say_untried(console, subject)
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
    text = _text_of(Corpus(examples, whole.rows, whole.left_out))
    _say_model(console, subject, None)
    say(console, f"{text.tokens:,} completion tokens, {text.through:,} through the model with their prompts.")
    held = list(StoreBudget(subject.size, text, dtype, settings.keep_top or 1.0).held())
    _say_held(console, held, subject.device, settings.output)
    if subject.base is None:
        _say_untried(console, subject)
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
    tokens, text = sum(len(example.completion_ids) for row, example in pairs if row not in held_out), _text_of(corpus)
    layer = layer_of(settings, subject.size.vocab_size)
    store = StoreBudget(subject.size, text, subject.size.dtype)
    budget = SupervisedBudget(store, settings, layer, min(tokens, settings.train_tokens or tokens))
    _say_model(console, subject, layer)
    _say_passes(console, budget)
    _say_held(console, list(budget.held()), subject.device, settings.features or cache_folder())
    if subject.base is None:
        _say_untried(console, subject)
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
    _say_model(console, subject, layer)
    _say_passes(console, budget)
    _say_held(console, list(budget.held()), subject.device, None)
    say(console, "Training on a store begins at once and shows its speed: it is not tried here.")


def _text_of(corpus: Corpus) -> Text:
    return Text(sum(len(example.completion_ids) for example in corpus.examples), sum(map(len, corpus.examples)))


def _say_model(console: Console, subject: Subject, layer: LayerConfig | None) -> None:
    size = subject.size
    dtype = str(size.dtype).removeprefix("torch.")
    sentence = f"{subject.settings.model}: {size.parameters:,} parameters in {dtype} on {subject.device}"
    if layer is not None:
        trainable = layer.num_parameters(size.hidden_size, size.vocab_size)
        sentence += f"; {trainable:,} trainable, {trainable / size.parameters:.3%} of them"
    say(console, f"{sentence}.")


def _say_passes(console: Console, budget: SupervisedBudget) -> None:
    settings, text = budget.settings, budget.store.text
    through = f" {text.through:,} tokens go through the model once, prompts counted." if text.through else ""
    say(
        console,
        f"About {budget.train_tokens:,} tokens to train on, {settings.epochs:,} times, {settings.batch_tokens:,} a "
        f"step.{through}",
    )


def _say_untried(console: Console, subject: Subject) -> None:
    say(console, f"The model is not tried, so that no hours are expected: {subject.reason}.")


def _say_held(console: Console, held: Sequence[Held], device: torch.device, folder: Path | None) -> None:
    table = Table("holds at least", "bytes", "where", "while", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for one in held:
        if one.bytes:
            place = device.type if one.place == "device" else one.place
            table.add_row(one.what, in_bytes(one.bytes), place, "" if one.phase == "always" else one.phase)
    console.print(table)
    together: list[tuple[tuple[Place, ...], str, int | None]] = [(("device", "host"), "memory", machine_bytes())]
    if device.type != "cpu":
        together = [(("device",), str(device), _memory_of(device)), (("host",), "memory", machine_bytes())]
    if folder is not None:
        together.append((("disk",), f"the disk of {folder}", _free_beside(folder)))
    for places, name, there in together:
        needed = peak(held, places)
        if needed and there is not None:
            verdict = "" if needed <= there else ", which does not fit"
            say(console, f"At one time {in_bytes(needed)} of {in_bytes(there)} in {name}{verdict}.")


def _memory_of(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_bytes()


def _free_beside(folder: Path) -> int:
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
