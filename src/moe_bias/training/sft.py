"""Supervised training on hidden states: after one pass the backbone is not needed again.

AdamW without weight decay, one rate for the experts and one for router and gate, a linear rise and a
linear decay to zero, gradients clipped by norm. Batches are of tokens, not of sequences: a hidden
state holds all the context that the layer sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_bias.backbone import Head
from moe_bias.config import LayerConfig, TrainingSettings, UserError, check_support
from moe_bias.features.extract import (
    Features,
    fork_coverage,
    measure_fork_mass,
    run_backbone,
    support_for,
    with_scalars,
)
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import meter
from moe_bias.tasks.conversations import Example
from moe_bias.training.objective import supervised_gradients

CALIBRATION_TOKENS = 4096
"""Forks for choosing a support are looked for among this many training tokens."""


@dataclass(frozen=True)
class Prepared:
    """Features to train on and to measure on, the layer's support and its coverage of held-out fork mass."""

    train: Features
    held_out: Features
    support: tuple[int, ...] | None
    fork_coverage: float


@dataclass(frozen=True)
class FitReport:
    """What a training run did: steps taken, and the loss in nats per token over the last epoch."""

    steps: int
    last_nll: float


def prepare(
    model: nn.Module,
    head: Head,
    train: Sequence[Example],
    held_out: Sequence[Example],
    settings: TrainingSettings,
    *,
    always: Sequence[int],
    batch_size: int,
) -> Prepared:
    """Runs the backbone once over both parts, and chooses the support on the training part.

    `always` are token ids that the support must hold. Raises UserError on a support that cannot be.
    """
    requested = parse_support(settings.support, head.vocab_size)
    train_tokens = run_backbone(model, train, batch_size, "training hidden states")
    held_out_tokens = run_backbone(model, held_out, batch_size, "held-out hidden states")
    if isinstance(requested, int):
        forks = measure_fork_mass(head, train_tokens.hidden[:CALIBRATION_TOKENS])
        support = support_for(forks, train_tokens.token, requested, always)
    else:
        support = requested
    covered = fork_coverage(measure_fork_mass(head, held_out_tokens.hidden[:CALIBRATION_TOKENS]), support)
    return Prepared(
        with_scalars(head, train_tokens, support, "training base distribution"),
        with_scalars(head, held_out_tokens, support, "held-out base distribution"),
        None if len(support) == head.vocab_size else tuple(support),
        covered,
    )


def parse_support(text: str, vocab_size: int) -> int | list[int]:
    """The size to choose for 'auto:M', all ids for 'all', or the ids that a JSON file lists.

    Raises UserError on anything else, naming it.
    """
    if text == "all":
        return list(range(vocab_size))
    kind, _, size = text.partition(":")
    if kind == "auto" and size.isdecimal() and 1 <= int(size) <= vocab_size:
        return int(size)
    if kind == "auto" or not Path(text).is_file():
        raise UserError(
            f"--support {text!r} is none of 'auto:M' with M from 1 to {vocab_size}, 'all', or a JSON file of token ids"
        )
    return _support_from_file(Path(text), vocab_size)


def _support_from_file(path: Path, vocab_size: int) -> list[int]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"support file {path} is not JSON: {error}") from error
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise UserError(f"support file {path} must hold one list of token ids")
    try:
        check_support(ids)
        LayerConfig(support=tuple(ids)).check_vocabulary(vocab_size)
    except ValueError as error:
        raise UserError(f"support file {path}: {error}") from error
    return ids


def fit(layer: MoEBiasLayer, features: Features, head: Head, settings: TrainingSettings, description: str) -> FitReport:
    """Trains the layer in place on the features; it must be where the head is.

    Raises UserError where the loss is not finite; the layer then holds the last step's weights.
    """
    layer.calibrate(features.hidden)
    logits_of = head.columns(features.support.to(head.device))
    steps_per_epoch = -(-len(features) // settings.batch_tokens)
    optimizer, schedule = _optimizer(layer, settings, settings.epochs * steps_per_epoch)
    losses: list[Tensor] = []
    with meter(description, settings.epochs * len(features), "tokens") as bar:
        for batch in _batches(features, settings):
            optimizer.zero_grad()
            loss = supervised_gradients(layer, batch.to(head.device), logits_of, head.transform)
            if not torch.isfinite(loss.total):
                raise UserError(f"the training loss became {loss.total.item()}; lower --expert-rate or --router-rate")
            torch.nn.utils.clip_grad_norm_(layer.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.nll)
            bar.advance(len(batch))
            bar.note(f"loss {losses[-1].item():.3f}")
    return FitReport(len(losses), float(torch.stack(losses[-steps_per_epoch:]).mean()))


def _batches(features: Features, settings: TrainingSettings) -> Iterator[Features]:
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        for index in torch.randperm(len(features), generator=generator).split(settings.batch_tokens):
            yield features.at(index)


def _optimizer(
    layer: MoEBiasLayer, settings: TrainingSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    slow = [parameter for name, parameter in layer.named_parameters() if name != "experts"]
    groups = [
        {"params": [layer.experts], "lr": settings.expert_rate},
        {"params": slow, "lr": settings.router_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rise = max(round(settings.warmup * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(steps - rise, 1))
    )
    return optimizer, schedule
