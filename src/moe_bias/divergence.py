"""How far the adapted policy is from a target model, exactly, from the support's columns and four scalars a token.

At a temperature T let u = z / T be a draft model's final logits and v those of a target model over the same
vocabulary, q = softmax(u) and p = softmax(v), with log-partitions log Z and log Z_p; a layer moves the columns of
the support S: u' = u + d on S, pi' = softmax(u'). Off the support the layer leaves q as it was but for its scale:

    pi'_i = c q_i for i not in S,    log c = log Z - log Z'

so that all of a sum over the rest that depends on the layer is c. With three scalars more of each token, from the
one pass that has both models' whole logits,

    P = sum_{i not in S} p_i                      the target's mass off the support
    G = sum_{i not in S} p_i (log p_i - log q_i)
    K = sum_{i not in S} q_i (log q_i - log p_i)

both divergences over the whole vocabulary need only the M columns of u and of v afterwards:

    KL(p | pi') = sum_S p_i (log p_i - log pi'_i) + G - P log c                  "forward", the loss of distillation
    KL(pi' | p) = sum_S pi'_i (log pi'_i - log p_i) + c (K + Q log c)            "reverse"

where Q = exp(R - log Z) is q's mass off the support (R: see `support`). G - P log c is what the split of the
cross-entropy into sum_{i not in S} p_i u_i and P gives, P log P' and the like taken together, so that large logits
are not subtracted from each other. Gradients by the support's u', the sums of p and pi' being 1:

    d KL(p | pi') / d u'_i = pi'_i - p_i
    d KL(pi' | p) / d u'_i = pi'_i (log pi'_i - log p_i - KL(pi' | p))

P, G and K enter values alone, and the first gradient not at all. The share of draft tokens that speculative decoding
accepts, sum_i min(p_i, pi'_i) (arXiv 2211.17192, 2302.01318), is no function of such scalars: sum over the rest of
min(p_i, c q_i) has another kink for each token. It is measured over the whole vocabulary, and not trained on;
1 - sum_i min(p_i, pi'_i) is at most sqrt(KL / 2) of either divergence (Pinsker).

Log-probabilities are raised to `LOWEST_LOG_PROB`: where one model excludes a token that the other one does not, the
divergence is large and not infinite.

Shapes: T tokens, V vocabulary, M support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.chunks import PIECE
from moe_bias.columns import Columns, joined
from moe_bias.layer import LOWEST_LOG_PROB, at_least_float32
from moe_bias.support import RestScalars, rest_mask


@dataclass(frozen=True)
class TargetScalars(Columns):
    """Of a target's distribution at each token, (T,) float64: log Z_p, P, G and K, the last two in nats."""

    log_partition: Tensor
    rest_mass: Tensor
    forward_rest: Tensor
    reverse_rest: Tensor


@dataclass(frozen=True)
class Divergences(Columns):
    """KL(p | pi') and KL(pi' | p) of each token (T,), in nats."""

    forward: Tensor
    reverse: Tensor


def target_scalars(target_TV: Tensor, logits_TV: Tensor, support_M: Tensor) -> TargetScalars:
    """P, G, K and log Z_p from the whole scaled logits of target and draft, without gradient.

    Both are finite or -inf, on the support's device.
    """
    off_support_V = rest_mask(support_M, logits_TV.shape[-1])
    size = PIECE.rows(logits_TV.shape[-1], logits_TV.device)
    pieces = zip(target_TV.detach().split(size), logits_TV.detach().split(size), strict=True)
    return joined([_of_piece(*piece, off_support_V) for piece in pieces])


def _of_piece(target_TV: Tensor, logits_TV: Tensor, off_support_V: Tensor) -> TargetScalars:
    log_p_TV, log_partition_T = _log_softmax(target_TV)
    log_q_TV, _ = _log_softmax(logits_TV)
    gap_TV = torch.where(off_support_V, log_p_TV - log_q_TV, 0)
    p_TV = log_p_TV.exp_()
    return TargetScalars(
        log_partition_T,
        torch.where(off_support_V, p_TV, 0).sum(-1).double(),
        torch.linalg.vecdot(p_TV, gap_TV).double(),
        -torch.linalg.vecdot(log_q_TV.exp_(), gap_TV).double(),
    )


def _log_softmax(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, V), none below the lowest, and the log-partition (T,) in float64."""
    logits_TV = at_least_float32(logits_TV)
    largest_T = logits_TV.amax(-1, keepdim=True)
    centred_TV = logits_TV - largest_T
    log_sum_T = centred_TV.logsumexp(-1, keepdim=True)
    log_prob_TV = centred_TV.sub_(log_sum_T).clamp_(min=LOWEST_LOG_PROB)
    return log_prob_TV, (largest_T.double() + log_sum_T.double()).squeeze(-1)


@dataclass(frozen=True)
class Draft(Columns):
    """What is kept of a draft's tokens: the realised token's logit (T,) and its column in the support (-1: none),
    the rest's scalars and log Z (T,) float64.
    """

    logit: Tensor
    column: Tensor
    rest: RestScalars
    log_partition: Tensor


def divergences_and_gradient(
    adapted_TM: Tensor, draft: Draft, target_TM: Tensor, target: TargetScalars
) -> tuple[Sequence[Tensor], Callable[[Sequence[Tensor]], Tensor]]:
    """`log pi'(y)`, KL(p | pi') and KL(pi' | p) of each token (T,), and what makes weights of them a gradient.

    `adapted_TM` are u', `target_TM` the target's scaled logits on the support; both are overwritten. The gradient
    (T, M) by u' of the sum of the three, each times its weights (T,), can be had once.
    """
    log_prob_T, log_c_T = _normalise(adapted_TM, draft)
    log_p_TM = _below(target_TM, target.log_partition).clamp_(min=LOWEST_LOG_PROB)
    log_pi_TM = adapted_TM
    p_TM, pi_TM = log_p_TM.exp(), log_pi_TM.exp()
    gap_TM = log_pi_TM.sub_(log_p_TM)
    forward_T = _forward(p_TM, gap_TM, log_c_T, target)
    reverse_T = _reverse(pi_TM, gap_TM, log_c_T, draft, target)

    def gradient_of(weights: Sequence[Tensor]) -> Tensor:
        realised_T, by_forward_T, by_reverse_T = weights
        scale_TM = gap_TM.sub_(reverse_T[:, None]).mul_(by_reverse_T[:, None])
        scale_TM.add_((by_forward_T - realised_T)[:, None])
        gradient_TM = scale_TM.mul_(pi_TM).sub_(p_TM.mul_(by_forward_T[:, None]))
        held_T = torch.where(draft.column >= 0, realised_T, 0)
        return gradient_TM.scatter_add_(-1, draft.column.clamp(min=0)[:, None], held_T[:, None])

    return [log_prob_T, forward_T, reverse_T], gradient_of


def _normalise(adapted_TM: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """Overwrites u' by log pi' on the support; returns `log pi'(y)` and `log c`, both (T,)."""
    rest_T, column_T = draft.rest.log_sum_exp, draft.column.clamp(min=0)
    held_T = adapted_TM.gather(-1, column_T[:, None]).squeeze(-1)
    largest_T = torch.maximum(adapted_TM.amax(-1), rest_T.to(adapted_TM.dtype))
    shift_T = torch.where(largest_T.isfinite(), largest_T, 0)
    relative_TM = adapted_TM.sub_(shift_T[:, None])
    rest_T = (rest_T - shift_T.double()).to(adapted_TM.dtype)
    log_sum_T = torch.logaddexp(relative_TM.logsumexp(-1), rest_T)
    log_prob_T = (torch.where(draft.column >= 0, held_T, draft.logit) - shift_T) - log_sum_T
    relative_TM.sub_(log_sum_T[:, None]).clamp_(min=LOWEST_LOG_PROB)
    log_partition_T = shift_T.double() + log_sum_T.double()
    return log_prob_T, (draft.log_partition - log_partition_T).to(adapted_TM.dtype)


def _forward(p_TM: Tensor, gap_TM: Tensor, log_c_T: Tensor, target: TargetScalars) -> Tensor:
    on_support_T: Tensor = -torch.linalg.vecdot(p_TM, gap_TM)
    return on_support_T + (target.forward_rest - target.rest_mass * log_c_T).to(p_TM.dtype)


def _reverse(pi_TM: Tensor, gap_TM: Tensor, log_c_T: Tensor, draft: Draft, target: TargetScalars) -> Tensor:
    base_rest_T = (draft.rest.log_sum_exp - draft.log_partition).exp()
    rest_T = log_c_T.exp() * (target.reverse_rest + base_rest_T * log_c_T)
    on_support_T: Tensor = torch.linalg.vecdot(pi_TM, gap_TM)
    return on_support_T + rest_T.to(pi_TM.dtype)


def _below(logits_TM: Tensor, log_partition_T: Tensor) -> Tensor:
    """Logits less their log-partition, which is kept in float64; overwrites the logits."""
    near_T = log_partition_T.to(logits_TM.dtype)
    return logits_TM.sub_(near_T[:, None]).sub_((log_partition_T - near_T.double()).to(logits_TM.dtype)[:, None])


def full_divergences(target_TV: Tensor, logits_TV: Tensor, move_TM: Tensor, support_M: Tensor) -> Divergences:
    """The plain reference of both divergences, over the whole vocabulary, differentiable in `move_TM`."""
    log_pi_TV = logits_TV.index_add(-1, support_M, move_TM.to(logits_TV.dtype)).log_softmax(-1)
    log_p_TV = target_TV.log_softmax(-1)
    return Divergences(
        (log_p_TV.exp() * (log_p_TV - log_pi_TV)).sum(-1), (log_pi_TV.exp() * (log_pi_TV - log_p_TV)).sum(-1)
    )


def in_common(target_TV: Tensor, vocab_size: int) -> Tensor:
    """The target's logits over a draft's vocabulary: rows that only pad the larger of two embeddings say nothing.

    What the draft lacks is cut off, what the target lacks is excluded.
    """
    missing = vocab_size - target_TV.shape[-1]
    return torch.nn.functional.pad(target_TV, (0, missing), value=-math.inf) if missing else target_TV


def acceptance(target_TV: Tensor, policy_TV: Tensor) -> Tensor:
    """`sum_i min(p_i, pi'_i)` (T,) in [0, 1] of the whole scaled logits: how likely a draft's token is accepted."""
    size = PIECE.rows(target_TV.shape[-1], target_TV.device)
    parts = [
        torch.minimum(at_least_float32(one_CV).softmax(-1), at_least_float32(other_CV).softmax(-1)).sum(-1)
        for one_CV, other_CV in zip(target_TV.split(size), policy_TV.split(size), strict=True)
    ]
    return torch.cat(parts)
