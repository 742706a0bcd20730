"""What a layer makes of the frozen model's distribution on features: log-probabilities, entropy, KL.

The layer's bias is coefficients times its table, whatever its experts are (see `layer`). All is at one temperature T:
features hold u = z / T and its scalars, `logits_of` gives u_S (T, M), final base logits over T, and the support's
columns move by s b / T. The entropy gate alone reads the base entropy at temperature 1, as it does when the layer
generates.

Shapes: T tokens, C coefficients, M support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.backbone import HeadTransform
from moe_bias.chunks import UPDATE, even_slices
from moe_bias.columns import joined
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer, Routing
from moe_bias.support import PolicyStats, log_prob_from_adapted, reduced_stats

LogitsOf = Callable[[slice], Tensor]
"""u_S (T, M) of a batch's given rows, as a tensor that may be overwritten."""


@dataclass(frozen=True)
class Adapted:
    """The policy on a batch: `log_prob` (T,) of the realised tokens, the routing, and `stats` where they are wanted."""

    log_prob: Tensor
    routing: Routing
    stats: PolicyStats | None = None


def adapted_policy(
    layer: MoEBiasLayer,
    batch: Features,
    logits_TM: Tensor,
    transform: HeadTransform,
    temperature: float = 1.0,
    with_stats: bool = False,
) -> Adapted:
    """The layer's effect on a batch of features, differentiable. `logits_TM` are u_S.

    Entropy and KL cost several times as much as log-probabilities alone.
    """
    mixture = layer.mix(batch.hidden, batch.entropy)
    move = TableMove(layer, layer.table(), transform, temperature)
    if not with_stats:
        adapted_TM = move.adapted(mixture.coefficients, logits_TM)
        return Adapted(log_prob_from_adapted(batch.logit, batch.column, adapted_TM, batch.rest), mixture.routing)
    move_TM = move.move(mixture.coefficients, logits_TM)
    log_prob_T = log_prob_from_adapted(batch.logit, batch.column, logits_TM + move_TM, batch.rest)
    return Adapted(log_prob_T, mixture.routing, reduced_stats(logits_TM, move_TM, batch.rest))


@dataclass(frozen=True)
class TableMove:
    """How a layer's table (C, M) moves the support's logits at a temperature, over which `logits_TM` are given."""

    layer: MoEBiasLayer
    table_CM: Tensor
    transform: HeadTransform
    temperature: float = 1.0

    def adapted(self, coefficients_TC: Tensor, logits_TM: Tensor) -> Tensor:
        """`u + d` (T, M) of each token's coefficients."""
        if self.transform.cap is not None:
            return logits_TM + self.move(coefficients_TC, logits_TM)
        coefficients_TC = (self.layer.strength / self.temperature) * coefficients_TC
        return torch.addmm(logits_TM, coefficients_TC, self.table_CM.to(coefficients_TC.dtype))

    def move(self, coefficients_TC: Tensor, logits_TM: Tensor) -> Tensor:
        """`d = s b / T` (T, M), as much of it as a soft-cap lets the final logits move."""
        bias_TM = (self.layer.strength * coefficients_TC) @ self.table_CM.to(coefficients_TC.dtype)
        return self.transform.reachable(self.temperature * logits_TM, bias_TM) / self.temperature


@torch.no_grad()
def policy_stats(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: LogitsOf,
    transform: HeadTransform,
    temperature: float = 1.0,
) -> PolicyStats:
    """Log-partition, entropy and exact KL to the base of the adapted policy, each (T,), without gradient."""
    coefficients_TC = layer.mix(batch.hidden, batch.entropy).coefficients
    move = TableMove(layer, layer.table(), transform, temperature)
    parts = []
    for rows in chunks(len(batch), move.table_CM):
        logits_TM = logits_of(rows)
        move_TM = move.move(coefficients_TC[rows], logits_TM)
        parts.append(reduced_stats(logits_TM, move_TM, batch.at(rows).rest))
    return joined(parts)


def mean_kl_to_base(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: LogitsOf,
    transform: HeadTransform,
    temperature: float = 1.0,
) -> float:
    """Exact mean KL(pi'|q) in nats a token over the batch; 0 without a token."""
    kl_T = policy_stats(layer, batch, logits_of, transform, temperature).kl.double()
    return float(kl_T.sum()) / max(len(kl_T), 1)


@torch.no_grad()
def mean_kl_between(
    layer: MoEBiasLayer,
    before: MoEBiasLayer,
    batch: Features,
    logits_of: LogitsOf,
    transform: HeadTransform,
    temperature: float = 1.0,
) -> float:
    """Exact mean KL(pi'|pi_before) in nats a token of two states of a layer: `before` takes the base's place."""
    moves = [TableMove(one, one.table(), transform, temperature) for one in (layer, before)]
    coefficients = [one.mix(batch.hidden, batch.entropy).coefficients for one in (layer, before)]
    total = 0.0
    for rows in chunks(len(batch), moves[0].table_CM):
        logits_TM = logits_of(rows)
        now_TM, then_TM = (move.move(part[rows], logits_TM) for move, part in zip(moves, coefficients, strict=True))
        total += float(reduced_stats(logits_TM + then_TM, now_TM - then_TM, batch.at(rows).rest).kl.double().sum())
    return total / len(batch)


def chunks(tokens: int, table_CM: Tensor) -> list[slice]:
    """Even slices over the tokens, at least one, with tokens x support tensors of the size that suits the device."""
    return even_slices(tokens, UPDATE.rows(table_CM.shape[-1], table_CM.device))
