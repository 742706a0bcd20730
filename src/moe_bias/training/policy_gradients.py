"""The objective of `policy_objective` on features: its gradient a chunk of tokens at a time, entropy and KL.

What is as wide as the support stays in the processor's cache, and memory does not grow with the
batch, as in `objective.supervised_gradients`. The plain reference is `policy_loss` of
`adapted_policy`. Log-probabilities alone take the fused `log_prob_from_adapted`; entropy and KL of
the whole distribution, which cost several times as much, are computed where they are wanted.

All is at the sampling temperature T: features hold u = z / T and its scalars, `logits_of` gives u_S
(T, M), final base logits over T, and the support's columns move by s b / T.

Shapes: T tokens, C coefficients, M support.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_bias.backbone import HeadTransform
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer, Routing, itself, load_balance_loss
from moe_bias.support import PolicyStats, log_prob_from_adapted, reduced_stats
from moe_bias.training.objective import TableMove, backward, chunks
from moe_bias.training.policy_objective import (
    AdaptedPolicy,
    PolicyLoss,
    PolicyTerms,
    Sampled,
    assembled_loss,
    policy_means,
)


def adapted_policy(
    layer: MoEBiasLayer, batch: Features, logits_TM: Tensor, transform: HeadTransform, terms: PolicyTerms
) -> AdaptedPolicy:
    """The layer's effect on a batch of features at the terms' temperature. `logits_TM` are u_S."""
    mixture = layer.mix(batch.hidden, batch.entropy)
    move = TableMove(layer, layer.table(), transform, terms.temperature)
    log_prob_T, stats = _policy_of(move, mixture.coefficients, batch, logits_TM, terms)
    return AdaptedPolicy(log_prob_T, mixture.routing, stats)


def policy_gradients(
    layer: MoEBiasLayer,
    batch: Features,
    sampled: Sampled,
    logits_of: Callable[[slice], Tensor],
    transform: HeadTransform,
    terms: PolicyTerms,
    total: Callable[[Tensor], Tensor] = itself,
) -> PolicyLoss:
    """Adds the gradient of `policy_loss` to the layer's parameters; returns the loss without graph.

    `batch` and `sampled` hold the selected tokens alone: no time is spent on the others. `logits_of`
    gives u_S (T, M) of the batch's given rows. `total` sums a tensor over the processes that share the
    batch: the loss returned is the whole batch's, the gradient this process's summand of it.
    """
    mixture = layer.mix(batch.hidden, batch.entropy)
    table_CM = layer.table()
    leaf_TC, leaf_CM = mixture.coefficients.detach().requires_grad_(), table_CM.detach().requires_grad_()
    move = TableMove(layer, leaf_CM, transform, terms.temperature)
    tokens = total(leaf_TC.new_tensor(float(len(batch))))
    means_4, log_probs = leaf_TC.new_zeros(4), []
    for rows in chunks(len(batch), leaf_CM):
        log_prob_T, stats = _policy_of(move, leaf_TC[rows], batch.at(rows), logits_of(rows), terms)
        part_4 = policy_means(log_prob_T, stats, sampled.at(rows), tokens, terms)
        (part_4 @ terms.weights(part_4)).backward()
        means_4 += part_4.detach()
        log_probs.append(log_prob_T.detach())
    balance, weight = load_balance_loss(mixture.routing, total=total), layer.config.load_balance_weight
    backward((mixture.coefficients, leaf_TC.grad), (table_CM, leaf_CM.grad), (weight * balance, None))
    means_4, balance = total(means_4), total(balance.detach())
    routing = Routing(mixture.routing.probs.detach(), mixture.routing.gates.detach())
    return assembled_loss(means_4, balance, weight, terms, tokens, AdaptedPolicy(torch.cat(log_probs), routing))


@torch.no_grad()
def policy_stats(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: Callable[[slice], Tensor],
    transform: HeadTransform,
    temperature: float = 1.0,
) -> PolicyStats:
    """Log-partition, entropy and exact KL to the base of the adapted policy, each (T,), without gradient.

    The entropy is what `select_high_entropy` is given: the training policy's at the sampling temperature.
    """
    coefficients_TC = layer.mix(batch.hidden, batch.entropy).coefficients
    move = TableMove(layer, layer.table(), transform, temperature)
    parts = []
    for rows in chunks(len(batch), move.table_CM):
        logits_TM = logits_of(rows)
        move_TM = move.move(coefficients_TC[rows], logits_TM)
        parts.append(reduced_stats(logits_TM, move_TM, batch.at(rows).rest))
    log_partition, entropy, kl = zip(*((p.log_partition, p.entropy, p.kl) for p in parts), strict=True)
    return PolicyStats(torch.cat(log_partition), torch.cat(entropy), torch.cat(kl))


def mean_kl_to_base(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: Callable[[slice], Tensor],
    transform: HeadTransform,
    temperature: float = 1.0,
    total: Callable[[Tensor], Tensor] = itself,
) -> float:
    """Exact mean KL(pi'|q) in nats a token over the batch, of all processes; 0 without a token."""
    kl_T = policy_stats(layer, batch, logits_of, transform, temperature).kl.double()
    sums_2 = total(torch.stack([kl_T.sum(), kl_T.new_tensor(float(len(kl_T)))]))
    return float(sums_2[0] / sums_2[1].clamp(min=1))


@torch.no_grad()
def mean_kl_between(
    layer: MoEBiasLayer,
    before: MoEBiasLayer,
    batch: Features,
    logits_of: Callable[[slice], Tensor],
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


def _policy_of(
    move: TableMove, coefficients_TC: Tensor, batch: Features, logits_TM: Tensor, terms: PolicyTerms
) -> tuple[Tensor, PolicyStats | None]:
    """Log-probabilities, and entropy and KL where a weight asks for them: they cost several times as much."""
    if not terms.needs_stats:
        adapted_TM = move.adapted(coefficients_TC, logits_TM)
        return log_prob_from_adapted(batch.logit, batch.column, adapted_TM, batch.rest), None
    move_TM = move.move(coefficients_TC, logits_TM)
    log_prob_T = log_prob_from_adapted(batch.logit, batch.column, logits_TM + move_TM, batch.rest)
    return log_prob_T, reduced_stats(logits_TM, move_TM, batch.rest)
