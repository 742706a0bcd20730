"""How gradients become steps: the optimiser, its rates, clipping, and what keeps many experts from over-fitting.

AdamW where gradients say where to go; SGD with momentum where their size says whether to go at all,
as in reinforcement learning: AdamW makes full-size steps of the tiny gradients of rare tokens.

The experts have a rate of their own, router and gate another: a bias is a logit, of order 1, a
router weight is of order 1 / sqrt(D). Rates rise linearly, then stay or fall linearly to 0; they are a
function of the step alone, so that a resumed run needs no state for them. Weight decay draws the
experts to 0, which is the base model, and leaves router and gate alone. Dropout leaves a share p of
the entries of B out of a step and scales the others by 1 / (1 - p).

Shapes: E experts, M support.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_bias.config import OptimiserSettings
from moe_bias.layer import MoEBiasLayer

STATE_PREFIX = "optimizer."
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

    def __init__(self, layer: MoEBiasLayer, settings: OptimiserSettings, steps: int) -> None:
        self._layer = layer
        self._settings = settings
        self._steps = steps
        self._slow = [parameter for name, parameter in layer.named_parameters() if name != "experts"]
        experts: dict[str, Any] = {"params": [layer.experts], "weight_decay": settings.weight_decay}
        groups = [experts, {"params": self._slow}]
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
            if settings.optimizer == "adamw"
            else torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=0.0)
        )

    def rates(self, step: int) -> tuple[float, float]:
        """The rates of the experts and of router and gate in step `step`, counted from 0."""
        factor = rate_factor(step, self._steps, self._settings.warmup, self._settings.decay == "linear")
        return factor * self._settings.expert_rate, factor * self._settings.router_rate

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._optimizer.zero_grad()

    def norms(self) -> GradientNorms:
        """Of the gradients as they are."""
        experts, router = (
            float(torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]))
            for part in ([self._layer.experts], self._slow)
        )
        return GradientNorms(float(np.hypot(experts, router)), experts, router)

    def step(self, step: int) -> None:
        """Clips the gradients and takes step `step`, counted from 0."""
        torch.nn.utils.clip_grad_norm_(self._layer.parameters(), self._settings.max_grad_norm)
        for group, rate in zip(self._optimizer.param_groups, self.rates(step), strict=True):
            group["lr"] = rate
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


@contextmanager
def dropped_experts(layer: MoEBiasLayer, share: float, seed: int, step: int) -> Iterator[None]:
    """While open, a share of the entries of B is 0 and the others are scaled up; afterwards B is as before.

    The gradient that was gathered meanwhile becomes the one of B itself. Which entries, follows from
    seed and step alone.
    """
    if share == 0:
        yield
        return
    mask_EM = _dropout_mask(layer.experts, share, seed, step)
    whole_EM = layer.experts.detach().clone()
    layer.experts.data.mul_(mask_EM)
    try:
        yield
    finally:
        layer.experts.data.copy_(whole_EM)
    if layer.experts.grad is not None:
        layer.experts.grad.mul_(mask_EM)


def _dropout_mask(experts_EM: Tensor, share: float, seed: int, step: int) -> Tensor:
    """(E, M): 0 with probability `share`, else 1 / (1 - share). Drawn on the CPU, so alike on every device."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    kept_EM = torch.rand(experts_EM.shape, generator=torch.Generator().manual_seed(mixed)) >= share
    return (kept_EM / (1 - share)).to(experts_EM)
