"""One update of a layer from a batch of lessons, and the bounds that it keeps.

Steps are taken on the batch, then the way that the parameters went is halved until the exact KL to the layer before
and to the frozen model are within their bounds, and lessons that are kept to measure by are not worse. Nothing is
drawn: the same layer, moments and batch give the same bytes.

Shapes: T tokens, M support, R rewarded answers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_bias.backbone import Head, HeadTransform
from moe_bias.config import LearnConfig
from moe_bias.features.adapted import LogitsOf, TableMove, adapted_policy
from moe_bias.layer import MoEBiasLayer
from moe_bias.learning.lessons import Batch
from moe_bias.learning.objective import FromFeedback
from moe_bias.support import reduced_log_partition
from moe_bias.training.gradients import gradients, mean_loss
from moe_bias.training.optimisation import Optimisation

HALVINGS = 4
"""Times that an update beyond its bounds is halved before it is given up."""


@dataclass(frozen=True)
class Change:
    """What an update did, exact KL in nats a token of its batch: to the layer before, and to the frozen model.

    `loss_before` and `loss_after` are on lessons to measure by. `refused` says why the layer must be put back, if it
    must. `share` is how much of the way was gone.
    """

    step_kl: float
    base_kl: float
    loss_before: float | None
    loss_after: float | None
    share: float
    refused: str


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
    held_out: Measured | None = None,
) -> Change:
    """Changes the layer. `baseline` is the reward from which an answer is better than others."""
    loss_before = None if held_out is None else loss_on(layer, held_out, transform, config)
    before = copy.deepcopy(layer).requires_grad_(False)
    batch, logits_of = measured.batch, measured.logits_of
    objective = objective_of(before, batch, logits_of, transform, config, baseline)
    for step in range(config.passes):
        optimisation.zero_grad()
        gradients(layer, batch.features, logits_of, transform, objective)
        optimisation.step(step)
    bounds = _Bounds(layer, before, measured, transform, config, held_out, loss_before)
    share = 1.0
    for _ in range(HALVINGS):
        change = bounds.look(share)
        if not change.refused:
            return change
        share /= 2
        with torch.no_grad():
            for now, then in zip(layer.parameters(), before.parameters(), strict=True):
                now.copy_((now + then) / 2)
    return bounds.look(share)


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


class _Bounds:
    """What an update is held to. What the layer before makes of the batch is computed once."""

    def __init__(
        self,
        layer: MoEBiasLayer,
        before: MoEBiasLayer,
        measured: Measured,
        transform: HeadTransform,
        config: LearnConfig,
        held_out: Measured | None,
        loss_before: float | None,
    ) -> None:
        self._layer, self._measured, self._transform = layer, measured, transform
        self._config, self._held_out, self._loss_before = config, held_out, loss_before
        self._then = Moved.by(before, measured, transform)

    def look(self, share: float) -> Change:
        """How the layer stands to them."""
        now = Moved.by(self._layer, self._measured, self._transform)
        step_kl, base_kl = now.mean_kl_to(self._then), now.mean_kl_to_base()
        if step_kl > self._config.step_kl or base_kl > self._config.base_kl:
            reason = (
                f"beyond its bounds, with an exact KL of {step_kl:.2f} nats to the version before and {base_kl:.2f} to "
                "the base"
            )
            return Change(step_kl, base_kl, self._loss_before, None, share, reason)
        if self._held_out is None or self._loss_before is None:
            return Change(step_kl, base_kl, None, None, share, "")
        loss = loss_on(self._layer, self._held_out, self._transform, self._config)
        is_worse = loss > self._loss_before + self._config.tolerance
        reason = f"worse on the lessons kept to measure by, {self._loss_before:.3f} to {loss:.3f}" if is_worse else ""
        return Change(step_kl, base_kl, self._loss_before, loss, share, reason)


@dataclass(frozen=True)
class Moved:
    """What a layer makes of a batch: its moves d (T, M), and log Z' (T,) float64 of the policy.

    KL(pi'|pi) = sum_S pi'_i (d'_i - d_i) - (log Z' - log Z), over the support S alone, as the rest does not move.
    """

    measured: Measured
    move: Tensor
    log_partition: Tensor

    @classmethod
    @torch.no_grad()
    def by(cls, layer: MoEBiasLayer, measured: Measured, transform: HeadTransform) -> Moved:
        """The layer as it is."""
        features = measured.batch.features
        coefficients_TC = layer.mix(features.hidden, features.entropy).coefficients
        move_TM = TableMove(layer, layer.table(), transform).move(coefficients_TC, measured.logits)
        shift_T, relative_T = reduced_log_partition(measured.logits, move_TM, features.rest)
        return cls(measured, move_TM, shift_T.double() + relative_T.double())

    def mean_kl_to(self, before: Moved) -> float:
        """Exact mean KL to another layer's policy, in nats a token."""
        return self._mean_kl(self.move - before.move, self.log_partition - before.log_partition)

    def mean_kl_to_base(self) -> float:
        """Exact mean KL to the frozen model, in nats a token."""
        return self._mean_kl(self.move, self.log_partition - self.measured.batch.features.log_partition)

    @cached_property
    def _prob(self) -> Tensor:
        adapted_TM = self.measured.logits + self.move
        return adapted_TM.sub_(self.log_partition.to(adapted_TM.dtype)[:, None]).exp_()

    def _mean_kl(self, gain_TM: Tensor, change_T: Tensor) -> float:
        gained_T = torch.linalg.vecdot(self._prob, gain_TM).double()
        return float((gained_T - change_T).mean().clamp(min=0))
