"""One update of a layer from a batch of lessons, and the bounds that it keeps.

Steps are taken on the batch, then the way that the parameters went is halved until the exact KL to the layer before
and to the frozen model are within their bounds. Nothing is drawn: the same layer, moments and batch give the same
bytes.

Shapes: T tokens, M support, R rewarded answers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.backbone import Head, HeadTransform
from moe_bias.config import LearnConfig
from moe_bias.features.adapted import LogitsOf, adapted_policy, mean_kl_between, mean_kl_to_base
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.learning.lessons import Batch
from moe_bias.learning.objective import FromFeedback
from moe_bias.training.gradients import gradients, mean_loss
from moe_bias.training.optimisation import Optimisation

HALVINGS = 4
"""Times that an update beyond its bounds is halved before it is given up."""


@dataclass(frozen=True)
class Change:
    """What an update did, exact KL in nats a token of its batch: to the layer before, and to the frozen model.

    `kept` tells whether the bounds hold; if not, the layer must be put back. `share` is how much of the way was gone.
    """

    step_kl: float
    base_kl: float
    share: float
    kept: bool


@dataclass(frozen=True)
class Measured:
    """A batch with its base logits u_S (T, M)."""

    batch: Batch
    logits: Tensor

    @classmethod
    def of(cls, batch: Batch, head: Head) -> Measured:
        """Computes the logits, on the head's device."""
        return cls(batch, head.columns(batch.features.support.to(head.device))(batch.features.hidden.to(head.device)))

    def logits_of(self, rows: slice) -> Tensor:
        """See `LogitsOf`."""
        return self.logits[rows].clone()


def update(
    layer: MoEBiasLayer,
    optimisation: Optimisation,
    measured: Measured,
    transform: HeadTransform,
    config: LearnConfig,
    baseline: float,
) -> Change:
    """Changes the layer. `baseline` is the reward from which an answer is better than others."""
    before = copy.deepcopy(layer).requires_grad_(False)
    batch, logits_of = measured.batch, measured.logits_of
    objective = objective_of(before, batch, logits_of, transform, config, baseline)
    for step in range(config.passes):
        optimisation.zero_grad()
        gradients(layer, batch.features, logits_of, transform, objective)
        optimisation.step(step)
    return _bounded(layer, before, batch.features, logits_of, transform, config)


def objective_of(
    layer: MoEBiasLayer,
    batch: Batch,
    logits_of: LogitsOf,
    transform: HeadTransform,
    config: LearnConfig,
    baseline: float,
) -> FromFeedback:
    """The loss of a batch for an update that begins at this layer."""
    log_prob_T = batch.features.logit
    if len(batch.reward):
        with torch.no_grad():
            log_prob_T = adapted_policy(layer, batch.features, logits_of(slice(None)), transform).log_prob
    advantage_R = batch.reward - baseline
    return FromFeedback(batch.pairs, advantage_R, batch.counts, log_prob_T, config.beta, config.preference_weight)


def loss_on(layer: MoEBiasLayer, measured: Measured, transform: HeadTransform, config: LearnConfig) -> float:
    """The mean loss of lessons that are not learned; the ratio of a rewarded answer is that to the frozen model."""
    batch = measured.batch
    base_T = (batch.features.logit - batch.features.log_partition).to(batch.features.logit.dtype)
    still = FromFeedback(batch.pairs, batch.reward, batch.counts, base_T, config.beta, config.preference_weight)
    return mean_loss(layer, batch.features, measured.logits_of, transform, still)


def _bounded(
    layer: MoEBiasLayer,
    before: MoEBiasLayer,
    features: Features,
    logits_of: LogitsOf,
    transform: HeadTransform,
    config: LearnConfig,
) -> Change:
    share = 1.0
    for _ in range(HALVINGS + 1):
        step_kl = mean_kl_between(layer, before, features, logits_of, transform)
        base_kl = mean_kl_to_base(layer, features, logits_of, transform)
        if step_kl <= config.step_kl and base_kl <= config.base_kl:
            return Change(step_kl, base_kl, share, kept=True)
        share /= 2
        with torch.no_grad():
            for now, then in zip(layer.parameters(), before.parameters(), strict=True):
                now.copy_((now + then) / 2)
    return Change(step_kl, base_kl, share, kept=False)
