"""The selected tokens of a step of reinforcement learning: what an update takes of them, wherever they are.

Shapes: T tokens, M support, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import RLConfig
from moe_bias.features.adapted import mean_kl_between, mean_kl_to_base
from moe_bias.features.extract import Features
from moe_bias.features.source import on_device
from moe_bias.layer import MoEBiasLayer, itself
from moe_bias.training.batches import Units, batches
from moe_bias.training.gradients import Loss, gradients
from moe_bias.training.metrics import Metrics, router_use
from moe_bias.training.objectives import Objective, Sampled, Unit
from moe_bias.training.processes import ALONE

LogitsAt = Callable[[Tensor | slice], Tensor]
"""Base logits (T, M) of the tokens of a step with these numbers."""


@dataclass(frozen=True)
class Lesson:
    """What an update was by: a minibatch's loss and metrics.

    `sampler_gap` is the largest difference of a log-probability from the sampler's, `router_entropy` the mean in nats,
    `used_experts` the share of experts with a token.
    """

    loss: float
    load_balance: float
    metrics: Mapping[str, float]
    sampler_gap: float
    router_entropy: float
    used_experts: float


Take = Callable[[], Lesson]
"""Adds a minibatch's gradient to the layer's parameters."""


class StepTokens(Protocol):
    """The tokens that a step learns from, and the layer that it trains, which is as it sampled when they are made."""

    def __len__(self) -> int:
        """How many there are."""

    def takes(self) -> Iterator[Take]:
        """The minibatches in their order, each to be taken before the next."""

    def kl(self) -> float:
        """Exact mean KL of the layer as it is to the base over the tokens, in nats."""

    def kl_from_sampler(self) -> float:
        """Exact mean KL of the layer as it is to the policy that sampled over the tokens, in nats."""

    def metrics(self) -> Metrics:
        """What else a line of metrics should have of the step."""


@dataclass
class Tokens:
    """Selected tokens in this process, and what a layer makes of them.

    `columns` gives final base logits on the layer's support; `sampler` is the policy that sampled (None: the layer as
    it is).
    """

    layer: MoEBiasLayer
    head: Head
    settings: RLConfig
    objective: Objective
    columns: Callable[[Tensor], Tensor]
    batch: Features
    sampled: Sampled
    sampler: MoEBiasLayer | None = None

    def __post_init__(self) -> None:
        device = self.head.device
        self.batch = on_device(self.batch, device)
        self.sampled = Sampled(self.sampled.log_prob.to(device), self.sampled.advantage.to(device))
        self._sampler = self.sampler or copy.deepcopy(self.layer).requires_grad_(False)
        self._logits_of = self._base_logits()

    def _base_logits(self) -> LogitsAt:
        """Final base logits over the temperature, u_S (T, M), of any of the tokens: kept where they fit, else made."""
        batch, temperature = self.batch, self.settings.temperature
        if 4 * len(batch) * len(batch.support) > self.settings.logits_budget:
            return lambda rows: self.columns(batch.hidden[rows]) / temperature
        logits_TM = self.columns(batch.hidden) / temperature
        return lambda rows: logits_TM[rows]

    def gradients(self, index: Tensor, total: Callable[[Tensor], Tensor] = itself) -> Loss:
        """Adds the gradient of the tokens `index` (T,); `total` as for `training.gradients`."""
        return gradients(
            self.layer,
            self.batch.at(index),
            lambda rows: self._logits_of(index[rows]),
            self.head.transform,
            self.objective,
            self.sampled.at(index),
            self.settings.temperature,
            total,
        )

    def kl(self) -> float:
        """Exact mean KL to the base, in nats."""
        temperature, transform = self.settings.temperature, self.head.transform
        return mean_kl_to_base(self.layer, self.batch, self._logits_of, transform, temperature)

    def kl_from_sampler(self) -> float:
        """Exact mean KL to the policy that sampled, in nats."""
        temperature, transform = self.settings.temperature, self.head.transform
        return mean_kl_between(self.layer, self._sampler, self.batch, self._logits_of, transform, temperature)

    def gap(self, loss: Loss, index: Tensor) -> float:
        """The largest difference of a log-probability of the tokens `index` from the sampler's."""
        return float((loss.log_prob - self.sampled.log_prob[index]).abs().max())


@dataclass(frozen=True)
class TokensHere:
    """All of a step's tokens, in this process: `StepTokens`."""

    tokens: Tokens
    step: int

    def __len__(self) -> int:
        return len(self.tokens.batch)

    def takes(self) -> Iterator[Take]:
        """See `StepTokens`."""
        example_T, unit = self.tokens.batch.example.cpu(), self.tokens.objective.unit
        for index in Minibatches.of(example_T, unit, self.tokens.settings, self.step):
            yield partial(self._take, index)

    def _take(self, index: Tensor) -> Lesson:
        loss = self.tokens.gradients(index)
        entropy, used = router_use(loss.routing, ALONE)
        means = {name: float(value) for name, value in loss.metrics.items()}
        gap = self.tokens.gap(loss, index)
        return Lesson(float(loss.total), float(loss.load_balance), means, gap, entropy, used)

    def kl(self) -> float:
        """See `StepTokens`."""
        return self.tokens.kl()

    def kl_from_sampler(self) -> float:
        """See `StepTokens`."""
        return self.tokens.kl_from_sampler()

    def metrics(self) -> Metrics:
        """Nothing else."""
        return {}


@dataclass(frozen=True)
class Minibatches:
    """The minibatches of a step: which units each has, and which tokens. The seed is one that runs of before used."""

    units: Units
    in_a_batch: int
    epochs: int
    seed: int

    @classmethod
    def of(cls, example_T: Tensor, unit: Unit, settings: RLConfig, step: int) -> Minibatches:
        """Of tokens of these examples."""
        units = Units.of(example_T, unit)
        return cls(units, units.in_a_batch(settings.batch_tokens), settings.epochs, settings.seed * 1_000_003 + step)

    def __len__(self) -> int:
        return -(-self.units.count // self.in_a_batch) * self.epochs

    def __iter__(self) -> Iterator[Tensor]:
        """Numbers of the tokens of each."""
        return map(self.units.tokens_of, self.drawn())

    def drawn(self) -> Iterator[Tensor]:
        """Numbers of the units of each."""
        return batches(self.units.count, self.in_a_batch, self.epochs, self.seed)
