"""How fast this machine is with a model: the code of a run, on a few tokens, for a second or so."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from moe_bias.commands.draft_settings import TrainDraftSettings
from moe_bias.config import CompareConfig, DraftConfig, LayerConfig, RLConfig, SFTConfig
from moe_bias.experiments.lora import completion_log_prob, lora_on
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.features.target import with_target
from moe_bias.frozen import Frozen
from moe_bias.progress import meter, without_bars
from moe_bias.rollout.answers import AnswerChoices, sampled_answers
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.tasks.conversations import Example
from moe_bias.training.objectives import Distillation
from moe_bias.training.problems import TaskData, policy_of, sampling_choices
from moe_bias.training.sft import fit

TOKENS = 128
"""Of prompts, or of examples, that a trial puts through the model."""
NEW_TOKENS = 8
"""Sampled in each row of a trial, after the first one."""
PASSES = 3
"""Of training over one batch."""


@dataclass(frozen=True)
class SamplingRate:
    """Answer tokens a second, sampled in so many rows at once; a run's own rows may be more, and then faster."""

    answers: float
    rows: int


@without_bars()
def sampling_rate(data: TaskData, settings: RLConfig, layer: LayerConfig) -> SamplingRate:
    """Of the frozen model in transformers under a layer that changes nothing."""
    longest = max(len(prompt) for prompt in data.train.prompts)
    prompts = data.train.prompts[: max(1, min(settings.batch_size, settings.prompts, TOKENS // longest))]
    fresh = data.head.layer(layer).to(data.head.device)
    sampler = TransformersSampler(data.model, data.head)  # a budget that a step exceeds is not the trial's
    choices = replace(sampling_choices(settings, data), stop_ids=[])

    def seconds(new_tokens: int) -> float:
        limited = replace(choices, max_new_tokens=new_tokens)
        return _seconds(lambda: sampler.sample(prompts, fresh, limited, settings.seed, ""))

    first = min(seconds(1), seconds(1))  # some things are made on first use
    more = max(seconds(1 + NEW_TOKENS) - first, 1e-6)
    rows = len(prompts) * settings.group
    return SamplingRate(rows * NEW_TOKENS / more, rows)


@without_bars()
def forward_rate(base: Frozen, examples: Sequence[Example]) -> float:
    """Tokens a second through the model, of the beginnings of a few examples."""
    few = _beginnings(examples)
    return sum(map(len, few)) / min(
        _seconds(lambda: run_backbone(base.model, few, len(few), "trial")) for _ in range(2)
    )


@without_bars()
def training_rate(base: Frozen, examples: Sequence[Example], settings: SFTConfig, layer: LayerConfig) -> float:
    """Tokens a second of a pass of training over hidden states, in batches as large as the settings say."""
    few = _beginnings(examples)
    support = range(base.head.vocab_size) if layer.support is None else layer.support
    features = with_scalars(base.head, run_backbone(base.model, few, len(few), "trial"), support, "trial")
    batch = features.at(torch.arange(settings.batch_tokens) % len(features))
    trial = settings.model_copy(update={"epochs": PASSES, "train_tokens": None})
    return PASSES * len(batch) / _seconds(lambda: fit(base.head.layer(layer), batch, base.head, trial, "trial"))


@without_bars()
def answering_rate(base: Frozen, prompts: Sequence[list[int]], settings: TrainDraftSettings) -> SamplingRate:
    """Of answers of the frozen model, one to each prompt, with the settings' batches and temperature."""
    longest = max(map(len, prompts))
    few = prompts[: max(1, min(settings.batch_size, TOKENS // longest))]
    policies, seeds = [policy_of(None, base.head)], list(range(len(few)))

    def seconds(new_tokens: int) -> float:
        choices = AnswerChoices(1, settings.temperature, 1.0, new_tokens, [])
        with meter("trial", len(few), "answers") as bar:
            return _seconds(lambda: sampled_answers(base.model, base.head, few, policies, choices, seeds, bar))

    first = min(seconds(1), seconds(1))
    more = max(seconds(1 + NEW_TOKENS) - first, 1e-6)
    return SamplingRate(len(few) * NEW_TOKENS / more, len(few))


@dataclass(frozen=True)
class DraftRates:
    """Tokens a second: hidden states through `both` output embeddings, and in a pass of `training`."""

    both: float
    training: float


@without_bars()
def draft_rates(
    small: Frozen, large: Frozen, examples: Sequence[Example], settings: DraftConfig, layer: LayerConfig
) -> DraftRates:
    """Of a few examples' tokens, in batches as large as the settings say."""
    few = _beginnings(examples)
    support = range(small.head.vocab_size) if layer.support is None else layer.support
    source, target = (
        with_scalars(base.head, run_backbone(base.model, few, len(few), "trial"), ids, "trial")
        for base, ids in ((small, support), (large, range(large.head.vocab_size)))
    )
    seconds = min(_seconds(lambda: with_target(source, target, small.head, large.head, "trial")) for _ in range(2))
    beside = with_target(source, target, small.head, large.head, "trial")
    batch = beside.at(torch.arange(settings.batch_tokens) % len(beside))
    trial = settings.model_copy(update={"epochs": PASSES, "train_tokens": None})
    objective, fresh = Distillation(settings.reverse), small.head.layer(layer)
    taken = _seconds(lambda: fit(fresh, batch, small.head, trial, "trial", objective=objective, target=large.head))
    return DraftRates(len(source) / seconds, PASSES * len(batch) / taken)


@dataclass(frozen=True)
class LoRARate:
    """Tokens a second, prompts counted, forward and back in a batch of `rows` of `length` tokens.

    `token_bytes` of states are kept of a token between the two, logits and the model's own weights not counted.
    """

    tokens: float
    token_bytes: int
    rows: int
    length: int


@without_bars()
def lora_rate(base: Frozen, examples: Sequence[Example], settings: CompareConfig) -> LoRARate:
    """Of the beginnings of a few examples under fresh LoRA weights, without a step of the optimiser."""
    few, kept = _beginnings(examples)[: settings.lora_batch_size], dict[int, torch.Tensor]()
    tokens = sum(map(len, few))
    with lora_on(base.model, settings.lora_rank, settings.seed) as adapted:
        own = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in own and tensor.shape[-1:] != (base.head.vocab_size,):
                kept[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = -completion_log_prob(adapted, few).mean()
        token_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // tokens
        kept.clear()
        loss.backward()
        seconds = min(_seconds(lambda: (-completion_log_prob(adapted, few).mean()).backward()) for _ in range(2))
    return LoRARate(tokens / seconds, token_bytes, len(few), max(map(len, few)))


def _beginnings(examples: Sequence[Example]) -> list[Example]:
    part = TOKENS // 4
    return [Example(example.prompt_ids[:part], example.completion_ids[:part]) for example in examples[:2]]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
