"""How fast this machine is with a model: the code of a run, on a few tokens, for a second or so."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from moe_bias.config import LayerConfig, RLConfig, SFTConfig
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.frozen import Frozen
from moe_bias.progress import without_bars
from moe_bias.tasks.conversations import Example
from moe_bias.training.problems import TaskData, sampler_of, sampling_choices
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
    fresh, sampler = data.head.layer(layer).to(data.head.device), sampler_of(settings, data)
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


def _beginnings(examples: Sequence[Example]) -> list[Example]:
    part = TOKENS // 4
    return [Example(example.prompt_ids[:part], example.completion_ids[:part]) for example in examples[:2]]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
