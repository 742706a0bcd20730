"""Objectives as pure functions: tensors in, a loss and its parts out.

Supervised: L = mean over the batch's tokens of -log pi'(y_t), plus the load-balance weight times
the Switch load-balance loss (arXiv 2101.03961) over the same tokens. The denominator is the number
of tokens in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_bias.backbone import HeadTransform
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer, Routing, load_balance_loss
from moe_bias.support import reduced_log_prob


@dataclass(frozen=True)
class SupervisedLoss:
    """`total` to minimise, and its parts: `nll` in nats per token and `load_balance`, unweighted."""

    total: Tensor
    nll: Tensor
    load_balance: Tensor


@dataclass(frozen=True)
class Adapted:
    """Log-probabilities (T,) of the realised tokens under the adapted policy, and the routing."""

    log_prob: Tensor
    routing: Routing


def adapted_log_prob(layer: MoEBiasLayer, batch: Features, logits_TM: Tensor, transform: HeadTransform) -> Adapted:
    """The layer's effect on a batch of features, at temperature 1. `logits_TM` are final base logits."""
    out = layer(batch.hidden, batch.entropy)
    move_TM = transform.reachable(logits_TM, layer.strength * out.bias)
    log_prob_T = reduced_log_prob(batch.logit, batch.column, logits_TM, move_TM, batch.rest)
    return Adapted(log_prob_T, out.routing)


def supervised_loss(adapted: Adapted, load_balance_weight: float) -> SupervisedLoss:
    """Mean negative log-likelihood plus the weighted load-balance loss."""
    nll = -adapted.log_prob.mean()
    balance = load_balance_loss(adapted.routing)
    return SupervisedLoss(nll + load_balance_weight * balance, nll, balance)
