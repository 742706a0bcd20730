"""LoRA on the backbone choosing among labels: trained on the labels' tokens, measured at the ends of the same prompts.

The rate is chosen by the NLL of one fold of the labelled texts, learnt from the others: trying a rate takes a training
through the backbone. The number of passes is given, and the rate falls to 0 over them (`lora.train_lora`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_bias.config import LabelsConfig
from moe_bias.experiments.label_arms import Chosen, Labels, folds_of, nll
from moe_bias.experiments.lora import Budget, LoRAChoices, lora_on, train_lora
from moe_bias.features.extract import run_backbone
from moe_bias.tasks.conversations import Example


def one_token(prompt_ids: list[int], token: int) -> Example:
    """A prompt and the token of its label."""
    return Example(prompt_ids, [token])


def run_lora(
    model: Any,
    labels: Labels,
    train: Sequence[Example],
    test: Sequence[Example],
    config: LabelsConfig,
    seed: int,
    rate: float | None = None,
) -> Chosen:
    """LoRA at the best of the config's rates, or at `rate`. Completions are the labels' tokens alone."""
    started = time.perf_counter()
    if rate is None:
        rate = _best_rate(model, labels, train, config, seed)
    searched = time.perf_counter()
    log_prob_NK, seconds, parameters = _trained(model, labels, train, test, config, rate, seed)
    return Chosen(log_prob_NK, seconds, searched - started, parameters, {"lora_rate": rate})


def _best_rate(model: Any, labels: Labels, train: Sequence[Example], config: LabelsConfig, seed: int) -> float:
    if len(config.lora_rates) == 1:
        return config.lora_rates[0]
    label_N = _numbers(labels, train)
    fold_N = folds_of(label_N, config.folds).tolist()
    rest = [example for example, fold in zip(train, fold_N, strict=True) if fold]
    part = [example for example, fold in zip(train, fold_N, strict=True) if not fold]
    losses = {}
    for rate in config.lora_rates:
        log_prob_NK = _trained(model, labels, rest, part, config, rate, seed)[0]
        losses[rate] = float(nll(log_prob_NK, _numbers(labels, part)).mean())
    return min(losses, key=lambda rate: losses[rate])


def _trained(
    model: Any,
    labels: Labels,
    train: Sequence[Example],
    test: Sequence[Example],
    config: LabelsConfig,
    rate: float,
    seed: int,
) -> tuple[Tensor, float, int]:
    """Log-probabilities (N, K) of the labels of `test`, the seconds of training, and the trainable parameters."""
    choices = LoRAChoices(config.lora_rank, rate, config.lora_batch_size)
    budget = Budget(config.lora_epochs * len(train), "tokens")
    with lora_on(model, config.lora_rank, seed) as adapted:
        report = train_lora(adapted, train, choices, budget, seed, f"lora, {len(train)} labels, rate {rate:g}")
        with torch.no_grad():
            hidden_ND = run_backbone(adapted, test, config.batch_size, "lora, other texts").hidden
    device, head = labels.head.device, labels.head
    logits_NK = head.columns(labels.token.to(device))(hidden_ND.to(device))
    return logits_NK.log_softmax(-1).cpu(), report.seconds, report.parameters


def _numbers(labels: Labels, examples: Sequence[Example]) -> Tensor:
    """The label of each example (N,) by its token."""
    token_N = torch.tensor([example.completion_ids[0] for example in examples])
    return (token_N[:, None] == labels.token).int().argmax(-1)
