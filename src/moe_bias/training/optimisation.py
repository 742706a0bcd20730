"""How gradients become steps: the optimiser, its rates, clipping, and what keeps many experts from over-fitting.

AdamW where gradients say where to go; SGD with momentum where their size says whether to go at all, as of free
entries in reinforcement learning: AdamW makes full-size steps of the tiny gradients of rare tokens.

The experts have a rate of their own, and so have free entries beside them; router, gate and what linear experts
read have another: a free entry is a logit, of order 1, a router weight is of order 1 / sqrt(D). Rates rise
linearly, then stay or fall linearly to 0; they are a function of the step alone, so that a resumed run needs no
state for them. Weight decay draws the experts to 0, which is the base model, and leaves router, gate and reads
alone. Dropout leaves a share p of the experts' numbers out of a step and scales the others by 1 / (1 - p).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_bias.config import OptimizerOptions
from moe_bias.layer import MoEBiasLayer
from moe_bias.training.batches import mixed_seed

STATE_PREFIX = "optimizer."
EXPERTS, ROUTER, ENTRIES = "experts", "router", "entries"
"""The parts that have rates of their own."""
MOMENTUM = 0.9
"""Of SGD."""


@dataclass(frozen=True)
class GradientNorms:
    """Euclidean norms before clipping: of everything, and of its two parts."""

    total: float
    experts: float
    router: float


class Optimisation:
    """The optimiser of one run of `steps` steps."""

    def __init__(self, layer: MoEBiasLayer, settings: OptimizerOptions, steps: int) -> None:
        self._layer = layer
        self._settings = settings
        self._steps = steps
        experts = expert_parameters(layer)
        self._experts = list(experts.values())
        self._slow = [parameter for name, parameter in layer.named_parameters() if name not in experts]
        entries = [layer.experts] if layer.directions is not None and layer.experts is not None else []
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._experts if all(p is not e for e in entries)], "part": EXPERTS},
            {"params": self._slow, "part": ROUTER},
        ]
        if entries:
            groups.append({"params": entries, "part": ENTRIES})
        groups = [group for group in groups if group["params"]]
        for group in groups:
            group["weight_decay"] = 0.0 if group["part"] == ROUTER else settings.weight_decay
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
            if settings.optimizer_of(layer.config.experts) == "adamw"
            else torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=0.0)
        )

    def rates(self, step: int) -> dict[str, float]:
        """The rate of each part, by its name, in step `step`, counted from 0."""
        factor = rate_factor(step, self._steps, self._settings.warmup, self._settings.decay == "linear")
        experts, router = self._settings.rates_of(self._layer.config.experts)
        return {EXPERTS: factor * experts, ROUTER: factor * router, ENTRIES: factor * self._settings.entry_rate}

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._optimizer.zero_grad()

    def norms(self) -> GradientNorms:
        """Of the gradients as they are."""
        experts, router = (
            float(torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]))
            for part in (self._experts, self._slow)
        )
        return GradientNorms(float(np.hypot(experts, router)), experts, router)

    def step(self, step: int, share: float = 1.0) -> None:
        """Clips the gradients and takes step `step`, counted from 0, at this share of its rates."""
        torch.nn.utils.clip_grad_norm_(self._layer.parameters(), self._settings.max_grad_norm)
        rates = self.rates(step)
        for group in self._optimizer.param_groups:
            group["lr"] = share * rates[group["part"]]
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The moments, by names that begin with `STATE_PREFIX`."""
        state = self._optimizer.state_dict()["state"]
        return {f"{STATE_PREFIX}{i}.{name}": value for i, part in state.items() for name, value in part.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `tensors` gave; other names are left alone."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(STATE_PREFIX):
                number, _, name = key.removeprefix(STATE_PREFIX).partition(".")
                state.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def rate_factor(step: int, steps: int, warmup: float, falls: bool = True) -> float:
    """What the rates are multiplied with in step `step` of `steps`, counted from 0.

    Rises to 1 over the first `warmup` share of the steps, then stays, or falls to 0 just after the last.
    """
    rise = max(round(warmup * steps), 1)
    return min((step + 1) / rise, (steps - step) / max(steps - rise, 1) if falls else 1.0)


def expert_parameters(layer: MoEBiasLayer) -> dict[str, nn.Parameter]:
    """What the experts' biases are made of: at 0, all of it, the layer changes nothing."""
    named = {"experts": layer.experts, "directions": layer.directions, "writes": layer.writes}
    return {name: parameter for name, parameter in named.items() if parameter is not None}


@contextmanager
def dropped_experts(layer: MoEBiasLayer, share: float, seed: int, step: int) -> Iterator[None]:
    """While open, a share of the experts' numbers is 0 and the others are scaled up; afterwards they are as before.

    The gradient that was gathered meanwhile becomes the one of the experts themselves. Which numbers, follows
    from seed and step alone.
    """
    if share == 0:
        yield
        return
    generator = torch.Generator().manual_seed(mixed_seed(seed, step))
    parameters = list(expert_parameters(layer).values())
    masks = [_dropout_mask(parameter, share, generator) for parameter in parameters]
    whole = [parameter.detach().clone() for parameter in parameters]
    for parameter, mask in zip(parameters, masks, strict=True):
        parameter.data.mul_(mask)
    try:
        yield
    finally:
        for parameter, before in zip(parameters, whole, strict=True):
            parameter.data.copy_(before)
    for parameter, mask in zip(parameters, masks, strict=True):
        if parameter.grad is not None:
            parameter.grad.mul_(mask)


def _dropout_mask(parameter: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """0 with probability `share`, else 1 / (1 - share). Drawn on the CPU, so alike on every device."""
    kept = torch.rand(parameter.shape, generator=generator) >= share
    return (kept / (1 - share)).to(parameter)
