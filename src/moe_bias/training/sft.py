"""Supervised training on hidden states: the backbone is not touched.

AdamW without weight decay, its own rate for experts and for router and gate, a linear rise and a
linear decay to zero, gradients clipped by norm. Batches are tokens, not sequences: the hidden state
holds all the context that the layer sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import TrainingSettings
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import meter
from moe_bias.training.objective import adapted_log_prob, supervised_loss


@dataclass(frozen=True)
class FitReport:
    """What a training run did: steps taken and the training loss in nats per token of the last epoch."""

    steps: int
    last_nll: float


def fit(layer: MoEBiasLayer, features: Features, head: Head, settings: TrainingSettings, description: str) -> FitReport:
    """Trains the layer in place on the features.

    Raises FloatingPointError where the loss is not finite; the layer then holds the last step's weights.
    """
    layer.calibrate(features.hidden)
    logits_of = head.columns(features.support)
    steps = settings.epochs * -(-len(features) // settings.batch_tokens)
    optimizer, schedule = _optimizer(layer, settings, steps)
    last: list[Tensor] = []
    with meter(description, settings.epochs * len(features), "tokens") as bar:
        for step, batch in enumerate(_batches(features, settings)):
            loss = supervised_loss(
                adapted_log_prob(layer, batch, logits_of(batch.hidden), head.transform),
                layer.config.load_balance_weight,
            )
            if not torch.isfinite(loss.total):
                raise FloatingPointError(f"the loss is {loss.total.item()} at step {step}; lower the learning rates")
            optimizer.zero_grad()
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            last = [*last, loss.nll.detach()][-steps // settings.epochs :]
            bar.advance(len(batch))
            bar.note(f"loss {loss.nll.item():.3f}")
    return FitReport(steps, float(torch.stack(last).mean()))


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
        optimizer, lambda step: min((step + 1) / rise, max(steps - step, 0) / max(steps - rise, 1))
    )
    return optimizer, schedule
