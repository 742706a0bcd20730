"""Objectives as pure functions: tensors in, a loss and its parts out.

Supervised: L = mean over the batch's tokens of -log pi'(y_t), plus the load-balance weight times
the Switch load-balance loss (arXiv 2101.03961) over the same tokens. The denominator is the number
of tokens in the batch.

`supervised_gradients` is the same loss, its gradient gathered a chunk of tokens at a time: what is
as wide as the support then stays in the processor's cache, and memory does not grow with the batch.

Over several processes, each with a part of the batch's tokens, the loss is still that of the whole
batch: both denominators and the routed shares f_e are summed over the processes.

Shapes: T tokens, D hidden, E experts, M support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.backbone import HeadTransform
from moe_bias.features.extract import Features
from moe_bias.features.source import FeatureSource, on_device
from moe_bias.layer import MoEBiasLayer, Routing, itself, load_balance_loss
from moe_bias.support import log_prob_and_gradient, log_prob_from_adapted
from moe_bias.training.base_logits import BaseLogits
from moe_bias.training.processes import ALONE, Processes

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Entries of a tokens x support tensor that are worked on at once, by kind of device."""


@dataclass(frozen=True)
class SupervisedLoss:
    """`total` to minimise, and its parts: `nll` in nats per token and `load_balance`, unweighted.

    `routing` is that of the tokens the loss is over, of this process's alone where there are several.
    """

    total: Tensor
    nll: Tensor
    load_balance: Tensor
    routing: Routing


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
    return SupervisedLoss(nll + load_balance_weight * balance, nll, balance, adapted.routing)


def supervised_gradients(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: Callable[[slice], Tensor],
    transform: HeadTransform,
    total: Callable[[Tensor], Tensor] = itself,
) -> SupervisedLoss:
    """Adds the gradient of `supervised_loss` to the layer's parameters; returns the loss without graph.

    `logits_of` gives the support's final base logits (T, M) of the batch's given rows, as a tensor that
    is overwritten. `total` sums a tensor over the processes that share the batch: the loss returned is
    the whole batch's, the gradient this process's summand of the whole batch's.
    """
    mixture = layer.mix(batch.hidden, batch.entropy)
    shares_TE, experts_EM = _scaled(layer, mixture.shares)
    mix = _MixGradient(shares_TE.detach(), experts_EM.detach(), transform)
    tokens = total(shares_TE.new_tensor(float(len(batch))))
    nll = torch.zeros_like(tokens)
    for rows in chunks(len(batch), layer.experts):
        nll -= mix.add(rows, batch.at(rows), logits_of(rows), tokens)
    balance, weight = load_balance_loss(mixture.routing, total=total), layer.config.load_balance_weight
    torch.autograd.backward([shares_TE, experts_EM, weight * balance], [mix.shares_TE, mix.experts_EM, None])
    nll, balance = total(nll), total(balance.detach())
    routing = Routing(mixture.routing.probs.detach(), mixture.routing.gates.detach())
    return SupervisedLoss(nll + weight * balance, nll, balance, routing)


@torch.no_grad()
def mean_nll(
    layer: MoEBiasLayer,
    source: FeatureSource,
    logits: BaseLogits,
    transform: HeadTransform,
    processes: Processes = ALONE,
) -> float:
    """Negative log-likelihood in nats per token of all the source's tokens under the layer.

    Each process takes every n-th chunk.
    """
    nll = torch.zeros((), dtype=torch.float64, device=layer.experts.device)
    for rows in chunks(len(source), layer.experts)[processes.rank :: processes.count]:
        batch = on_device(source.at(rows), layer.experts.device)
        logits_TM = logits.of(torch.arange(rows.start, rows.start + len(batch)), batch)(slice(None))
        nll -= adapted_log_prob(layer, batch, logits_TM, transform).log_prob.double().sum()
    return float(processes.total(nll)) / len(source)


def chunks(tokens: int, experts_EM: Tensor) -> list[slice]:
    """Even slices over the tokens whose tokens x support tensors are of the size that suits the device.

    Even, because a short last slice reads all columns for a few tokens. At least one, so that a process
    without a token in a small batch takes part with zeros.
    """
    size = CHUNK_ELEMENTS.get(experts_EM.device.type, CHUNK_ELEMENTS["cuda"])
    most = max(size // experts_EM.shape[-1], 1)
    count = max(math.ceil(tokens / most), 1)
    rows = max(math.ceil(tokens / count), 1)
    return [slice(start, start + rows) for start in range(0, max(tokens, 1), rows)]


def adapted_logits(
    layer: MoEBiasLayer, shares_TE: Tensor, logits_TM: Tensor, transform: HeadTransform, temperature: float = 1.0
) -> Tensor:
    """`u + d` (T, M) of each token's shares of the experts; `logits_TM` are final base logits over the temperature."""
    if transform.cap is not None:
        return logits_TM + support_move(layer, shares_TE, logits_TM, transform, temperature)
    shares_TE = (layer.strength / temperature) * shares_TE
    return torch.addmm(logits_TM, shares_TE, layer.experts.to(shares_TE.dtype))


def support_move(
    layer: MoEBiasLayer, shares_TE: Tensor, logits_TM: Tensor, transform: HeadTransform, temperature: float = 1.0
) -> Tensor:
    """`d = s b / T` (T, M), as much of it as a soft-cap lets the final logits move."""
    bias_TM = (layer.strength * shares_TE) @ layer.experts.to(shares_TE.dtype)
    return transform.reachable(temperature * logits_TM, bias_TM) / temperature


def _log_prob_of(
    layer: MoEBiasLayer, shares_TE: Tensor, batch: Features, logits_TM: Tensor, transform: HeadTransform
) -> Tensor:
    adapted_TM = adapted_logits(layer, shares_TE, logits_TM, transform)
    return log_prob_from_adapted(batch.logit, batch.column, adapted_TM, batch.rest)


def _scaled(layer: MoEBiasLayer, shares_TE: Tensor) -> tuple[Tensor, Tensor]:
    """What is multiplied to the move of the support's logits: shares times the strength, and the experts."""
    return layer.strength * shares_TE, layer.experts.to(shares_TE.dtype)


class _MixGradient:
    """Gathers the gradient of the mean negative log-likelihood by shares (T, E) and experts (E, M).

    Written out, and in place: autograd would copy what is as wide as the support at every turn.
    """

    def __init__(self, shares_TE: Tensor, experts_EM: Tensor, transform: HeadTransform) -> None:
        self._shares_TE, self._experts_EM, self._transform = shares_TE, experts_EM, transform
        self.shares_TE, self.experts_EM = torch.zeros_like(shares_TE), torch.zeros_like(experts_EM)

    @torch.no_grad()
    def add(self, rows: slice, batch: Features, logits_TM: Tensor, tokens: Tensor) -> Tensor:
        """Adds a chunk's part, where the mean is over `tokens`; returns its summand of the mean log-probability."""
        shares_TE, experts_EM = self._shares_TE[rows], self._experts_EM
        adapted_TM, move_gradient = self._adapted(shares_TE, logits_TM)
        weight_T = (-1 / tokens).expand(len(batch))
        log_prob_T, gradient_TM = log_prob_and_gradient(batch.logit, batch.column, adapted_TM, batch.rest, weight_T)
        gradient_TM = move_gradient(gradient_TM)
        torch.mm(gradient_TM, experts_EM.T, out=self.shares_TE[rows])
        self.experts_EM.addmm_(shares_TE.T, gradient_TM)
        return log_prob_T.sum() / tokens

    def _adapted(self, shares_TE: Tensor, logits_TM: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The adapted logits, and how a gradient by them becomes one by the mix of experts."""
        if self._transform.cap is None:
            return logits_TM.addmm_(shares_TE, self._experts_EM), itself
        mix_TM = (shares_TE @ self._experts_EM).requires_grad_()
        with torch.enable_grad():
            move_TM = self._transform.reachable(logits_TM, mix_TM)
        return logits_TM + move_TM.detach(), lambda gradient_TM: torch.autograd.grad(move_TM, mix_TM, gradient_TM)[0]
