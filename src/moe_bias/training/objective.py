"""Objectives as pure functions: tensors in, a loss and its parts out.

Supervised: L = mean over the batch's tokens of -log pi'(y_t) + kl_weight KL(pi'|q), the KL to the base exact,
plus the load-balance weight times the Switch load-balance loss (arXiv 2101.03961) over the same tokens. The
denominator is the number of tokens in the batch.

`supervised_gradients` is the same loss, its gradient gathered a chunk of tokens at a time: memory for what is
as wide as the support is used again, and does not grow with the batch.

Over several processes, each with a part of the batch's tokens, the loss is still that of the whole
batch: both denominators and the routed shares f_e are summed over the processes.

The layer's bias is coefficients times its table, whatever its experts are (see `layer`): the gradient by
both is gathered, and autograd takes it on from there, once a step.

Shapes: T tokens, D hidden, C coefficients, M support.
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
from moe_bias.support import log_prob_and_gradient, log_prob_from_adapted, reduced_stats
from moe_bias.training.base_logits import BaseLogits
from moe_bias.training.processes import ALONE, Processes

CHUNK_ELEMENTS = {"cpu": 3 * 2**21, "cuda": 2**26}
"""Entries of a tokens x support tensor that are worked on at once, by kind of device.

On a CPU 24 MiB: the C library maps what takes 32 MiB or more anew each time, and its page faults cost a large
batch a third of its time.
"""


@dataclass(frozen=True)
class SupervisedLoss:
    """`total` to minimise, and its parts: `nll` and `kl` in nats per token, and `load_balance`, unweighted.

    `kl` is the exact KL to the base, 0 where it has no weight.
    `routing` is that of the tokens the loss is over, of this process's alone where there are several.
    """

    total: Tensor
    nll: Tensor
    kl: Tensor
    load_balance: Tensor
    routing: Routing


@dataclass(frozen=True)
class Adapted:
    """Of the adapted policy, each (T,): log-probability of the realised token, KL to the base; and the routing."""

    log_prob: Tensor
    routing: Routing
    kl: Tensor


def adapted_log_prob(
    layer: MoEBiasLayer, batch: Features, logits_TM: Tensor, transform: HeadTransform, with_kl: bool = False
) -> Adapted:
    """The layer's effect on a batch of features, at temperature 1. `logits_TM` are final base logits.

    KL costs several times as much as log-probabilities alone: 0 unless it is wanted.
    """
    mixture = layer.mix(batch.hidden, batch.entropy)
    move = TableMove(layer, layer.table(), transform)
    adapted_TM = move.adapted(mixture.coefficients, logits_TM)
    log_prob_T = log_prob_from_adapted(batch.logit, batch.column, adapted_TM, batch.rest)
    if not with_kl:
        return Adapted(log_prob_T, mixture.routing, torch.zeros_like(log_prob_T))
    move_TM = move.move(mixture.coefficients, logits_TM)
    return Adapted(log_prob_T, mixture.routing, reduced_stats(logits_TM, move_TM, batch.rest).kl)


def supervised_loss(adapted: Adapted, load_balance_weight: float, kl_weight: float = 0.0) -> SupervisedLoss:
    """Mean negative log-likelihood plus the weighted KL to the base and the weighted load-balance loss."""
    nll, kl = -adapted.log_prob.mean(), adapted.kl.mean()
    balance = load_balance_loss(adapted.routing)
    return SupervisedLoss(nll + kl_weight * kl + load_balance_weight * balance, nll, kl, balance, adapted.routing)


def supervised_gradients(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: Callable[[slice], Tensor],
    transform: HeadTransform,
    total: Callable[[Tensor], Tensor] = itself,
    kl_weight: float = 0.0,
) -> SupervisedLoss:
    """Adds the gradient of `supervised_loss` to the layer's parameters; returns the loss without graph.

    `logits_of` gives the support's final base logits (T, M) of the batch's given rows, as a tensor that
    is overwritten. `total` sums a tensor over the processes that share the batch: the loss returned is
    the whole batch's, the gradient this process's summand of the whole batch's.
    """
    mixture = layer.mix(batch.hidden, batch.entropy)
    coefficients_TC = layer.strength * mixture.coefficients
    table_CM = layer.table().to(coefficients_TC.dtype)
    mix = _MixGradient(coefficients_TC.detach(), table_CM.detach(), transform, kl_weight)
    tokens = total(coefficients_TC.new_tensor(float(len(batch))))
    nll, kl = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for rows in chunks(len(batch), table_CM):
        nll_part, kl_part = mix.add(rows, batch.at(rows), logits_of(rows), tokens)
        nll, kl = nll + nll_part, kl + kl_part
    balance, weight = load_balance_loss(mixture.routing, total=total), layer.config.load_balance_weight
    backward((coefficients_TC, mix.coefficients_TC), (table_CM, mix.table_CM), (weight * balance, None))
    nll, kl, balance = total(nll), total(kl), total(balance.detach())
    routing = Routing(mixture.routing.probs.detach(), mixture.routing.gates.detach())
    return SupervisedLoss(nll + kl_weight * kl + weight * balance, nll, kl, balance, routing)


def backward(*roots: tuple[Tensor, Tensor | None]) -> None:
    """Runs back from tensors with their gradients (None: of a scalar, 1), those that depend on a parameter.

    Without a router the balance does not, and the coefficients of one free expert without a gate are constant.
    """
    trained = [(root, gradient) for root, gradient in roots if root.requires_grad]
    torch.autograd.backward([root for root, _ in trained], [gradient for _, gradient in trained])


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
    nll = torch.zeros((), dtype=torch.float64, device=layer.device)
    for rows in chunks(len(source), layer.table())[processes.rank :: processes.count]:
        batch = on_device(source.at(rows), layer.device)
        logits_TM = logits.of(torch.arange(rows.start, rows.start + len(batch)), batch)(slice(None))
        nll -= adapted_log_prob(layer, batch, logits_TM, transform).log_prob.double().sum()
    return float(processes.total(nll)) / len(source)


def chunks(tokens: int, table_CM: Tensor) -> list[slice]:
    """Even slices over the tokens whose tokens x support tensors are of the size that suits the device.

    Even, because a short last slice reads all columns for a few tokens. At least one, so that a process
    without a token in a small batch takes part with zeros.
    """
    size = CHUNK_ELEMENTS.get(table_CM.device.type, CHUNK_ELEMENTS["cuda"])
    most = max(size // table_CM.shape[-1], 1)
    count = max(math.ceil(tokens / most), 1)
    rows = max(math.ceil(tokens / count), 1)
    return [slice(start, start + rows) for start in range(0, max(tokens, 1), rows)]


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


class _MixGradient:
    """Gathers the gradient of the mean of -log pi'(y) + kl_weight KL by coefficients (T, C) and table (C, M).

    Written out, and in place: autograd would copy what is as wide as the support at every turn. Only KL, whose gradient
    needs float64 in places, and a soft-cap are left to it.
    """

    def __init__(
        self, coefficients_TC: Tensor, table_CM: Tensor, transform: HeadTransform, kl_weight: float = 0.0
    ) -> None:
        self._coefficients_TC, self._table_CM, self._transform = coefficients_TC, table_CM, transform
        self._kl_weight = kl_weight
        self.coefficients_TC, self.table_CM = torch.zeros_like(coefficients_TC), torch.zeros_like(table_CM)

    @torch.no_grad()
    def add(self, rows: slice, batch: Features, logits_TM: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a chunk's part, where means are over `tokens`; returns its summands of the means of NLL and KL."""
        coefficients_TC, table_CM = self._coefficients_TC[rows], self._table_CM
        if self._kl_weight:
            nll, kl, gradient_TM = self._with_kl(coefficients_TC, batch, logits_TM, tokens)
        else:
            nll, gradient_TM = self._alone(coefficients_TC, batch, logits_TM, tokens)
            kl = torch.zeros_like(nll)
        torch.mm(gradient_TM, table_CM.T, out=self.coefficients_TC[rows])
        self.table_CM.addmm_(coefficients_TC.T, gradient_TM)
        return nll, kl

    def _alone(
        self, coefficients_TC: Tensor, batch: Features, logits_TM: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The chunk's NLL, and its gradient (T, M) by the bias."""
        adapted_TM, move_gradient = self._adapted(coefficients_TC, logits_TM)
        weight_T = (-1 / tokens).expand(len(batch))
        log_prob_T, gradient_TM = log_prob_and_gradient(batch.logit, batch.column, adapted_TM, batch.rest, weight_T)
        return -log_prob_T.sum() / tokens, move_gradient(gradient_TM)

    def _with_kl(
        self, coefficients_TC: Tensor, batch: Features, logits_TM: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk's NLL and KL, and the gradient (T, M) of both, weighted, by the bias."""
        bias_TM = (coefficients_TC @ self._table_CM).requires_grad_()
        with torch.enable_grad():
            move_TM = bias_TM if self._transform.cap is None else self._transform.reachable(logits_TM, bias_TM)
            log_prob_T = log_prob_from_adapted(batch.logit, batch.column, logits_TM + move_TM, batch.rest)
            nll, kl = -log_prob_T.sum() / tokens, reduced_stats(logits_TM, move_TM, batch.rest).kl.sum() / tokens
            (gradient_TM,) = torch.autograd.grad(nll + self._kl_weight * kl, bias_TM)
        return nll.detach(), kl.detach(), gradient_TM

    def _adapted(self, coefficients_TC: Tensor, logits_TM: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The adapted logits, and how a gradient by them becomes one by the bias."""
        if self._transform.cap is None:
            return logits_TM.addmm_(coefficients_TC, self._table_CM), itself
        bias_TM = (coefficients_TC @ self._table_CM).requires_grad_()
        with torch.enable_grad():
            move_TM = self._transform.reachable(logits_TM, bias_TM)
        return logits_TM + move_TM.detach(), lambda gradient_TM: torch.autograd.grad(move_TM, bias_TM, gradient_TM)[0]
