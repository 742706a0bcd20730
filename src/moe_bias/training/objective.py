"""Objectives as pure functions: tensors in, a loss and its parts out.

Supervised: L = mean over the batch's tokens of -log pi'(y_t), plus the load-balance weight times
the Switch load-balance loss (arXiv 2101.03961) over the same tokens. The denominator is the number
of tokens in the batch.

`supervised_gradients` is the same loss, its gradient gathered a chunk of tokens at a time: what is
as wide as the support then stays in the processor's cache, and memory does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.backbone import HeadTransform
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer, Routing, load_balance_loss
from moe_bias.support import log_prob_from_adapted

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Entries of a tokens x support tensor that are worked on at once, by kind of device."""


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
    mixture = layer.mix(batch.hidden, batch.entropy)
    return Adapted(_log_prob_of(layer, mixture.shares, batch, logits_TM, transform), mixture.routing)


def supervised_loss(adapted: Adapted, load_balance_weight: float) -> SupervisedLoss:
    """Mean negative log-likelihood plus the weighted load-balance loss."""
    nll = -adapted.log_prob.mean()
    balance = load_balance_loss(adapted.routing)
    return SupervisedLoss(nll + load_balance_weight * balance, nll, balance)


def supervised_gradients(
    layer: MoEBiasLayer, batch: Features, logits_of: Callable[[Tensor], Tensor], transform: HeadTransform
) -> SupervisedLoss:
    """Adds the gradient of `supervised_loss` to the layer's parameters; returns the loss without graph.

    `logits_of` gives the support's final base logits (T, M) of hidden states (T, D).
    """
    mixture = layer.mix(batch.hidden, batch.entropy)
    shares_TE = mixture.shares.detach().requires_grad_()
    parts = []
    for rows in chunks(len(batch), layer.experts):
        part = batch.at(rows)
        log_prob_T = _log_prob_of(layer, shares_TE[rows], part, logits_of(part.hidden), transform)
        (-log_prob_T.sum() / len(batch)).backward()
        parts.append(log_prob_T.detach())
    loss = supervised_loss(Adapted(torch.cat(parts), mixture.routing), layer.config.load_balance_weight)
    torch.autograd.backward([mixture.shares, loss.total], [shares_TE.grad, None])
    return SupervisedLoss(loss.total.detach(), loss.nll, loss.load_balance.detach())


def chunks(tokens: int, experts_EM: Tensor) -> list[slice]:
    """Slices over the tokens whose tokens x support tensors are of the size that suits the device."""
    size = CHUNK_ELEMENTS.get(experts_EM.device.type, CHUNK_ELEMENTS["cuda"])
    rows = max(size // experts_EM.shape[-1], 1)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _log_prob_of(
    layer: MoEBiasLayer, shares_TE: Tensor, batch: Features, logits_TM: Tensor, transform: HeadTransform
) -> Tensor:
    shares_TE, experts_EM = layer.strength * shares_TE, layer.experts.to(shares_TE.dtype)
    if transform.cap is None:
        adapted_TM = torch.addmm(logits_TM, shares_TE, experts_EM)
    else:
        adapted_TM = logits_TM + transform.reachable(logits_TM, shares_TE @ experts_EM)
    return log_prob_from_adapted(batch.logit, batch.column, adapted_TM, batch.rest)
