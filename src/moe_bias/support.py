"""The support: which M tokens have a bias, and exact softmax quantities of the adapted policy from them.

At temperature T let u = z / T be the final base logits and d the move of the support's columns
(s b / T). With two scalars per token from the pass that computed the hidden state,

    R = log sum_{v not in S} exp(u_v)          rest log-sum-exp
    A = sum_{v not in S} exp(u_v - R) u_v      rest mean logit

the adapted policy needs only the support's columns (u' = u + d on S):

    log Z'    = logaddexp(R, logsumexp_S u')
    log pi'(y) = u_y + [y in S] d_y - log Z'
    H(pi')    = log Z' - (exp(R - log Z') A + sum_S exp(u' - log Z') u')
    KL(pi'|q) = sum_S exp(u' - log Z') d - (log Z' - log Z)

`base_scalars` takes R, A, log Z and the base entropy in one pass with one exponential a logit: support and
rest are summed apart, each relative to its own largest logit, so that neither is lost beside the other, and
every sum is of one sign. `rest_scalars` and `layer.entropy_from_logits` are its plain references.

Everything is computed relative to one shift per token, near the largest adapted logit. R and A, and
where entropy and KL are wanted also u + d - shift and log(pi'/q), are taken in float64: at logits of
1e4 float32 alone would lose three decimals that the result keeps. KL is summed over log(pi'/q), which
is near 0 where the two policies agree, and not over d, which need not be.

Shapes: T tokens, V vocabulary, M support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_bias.chunks import PIECE
from moe_bias.columns import Columns, joined
from moe_bias.layer import LOWEST_LOG_PROB, at_least_float32, entropy_from_logits
from moe_bias.mistakes import UserError

RHO = 0.2
"""Forks are the positions in the top 20% of base entropy (arXiv 2506.01939)."""
_ROUNDING = 1e-6
"""0.07 * 100 is 7.000000000000001: without this allowance its rank would be 8."""


@dataclass(frozen=True)
class RestScalars(Columns):
    """R and A of each token, (T,) float64; R = -inf and A = 0 where the rest is empty."""

    log_sum_exp: Tensor
    mean_logit: Tensor


@dataclass(frozen=True)
class BaseScalars(Columns):
    """Of the base distribution, each (T,): entropy in nats (float32 or better), log Z (float64), R and A."""

    entropy: Tensor
    log_partition: Tensor
    rest: RestScalars


@dataclass(frozen=True)
class VocabularySplit:
    """Support and rest as one pass reads them: the smaller part is gathered, the other masked out of the whole.

    `gathered` (N,) int64: ids of the smaller part; `penalty` (V,) float32: -inf at those ids, 0
    elsewhere; `rest_is_gathered`: which of the two the smaller part is.
    """

    gathered: Tensor
    penalty: Tensor
    rest_is_gathered: bool


@dataclass(frozen=True)
class PolicyStats(Columns):
    """Of the adapted policy, each (T,): `log_partition` (float64), `entropy` and `kl` to the base in nats."""

    log_partition: Tensor
    entropy: Tensor
    kl: Tensor


def rest_mask(support: Tensor, vocab_size: int) -> Tensor:
    """(V,) bool, True off the support."""
    mask = torch.ones(vocab_size, dtype=torch.bool, device=support.device)
    mask[support] = False
    return mask


def rest_scalars(logits_TV: Tensor, support_M: Tensor) -> RestScalars:
    """R and A from the full scaled logits. -inf logits count as probability 0."""
    logits_TV = at_least_float32(logits_TV)
    rest_TR = logits_TV[:, rest_mask(support_M, logits_TV.shape[-1])]
    if rest_TR.shape[-1] == 0:
        empty_T = torch.zeros(len(logits_TV), dtype=torch.float64, device=logits_TV.device)
        return RestScalars(empty_T - math.inf, empty_T)
    shift_T = _finite(rest_TR.amax(-1))
    relative_TR = rest_TR - shift_T[:, None]
    log_sum_T = relative_TR.logsumexp(-1)
    share_TR = (relative_TR - log_sum_T[:, None]).exp()
    mean_T = torch.where(share_TR > 0, share_TR * relative_TR, 0).sum(-1)
    return RestScalars(log_sum_T.double() + shift_T.double(), mean_T.double() + shift_T.double())


def split_vocabulary(support_M: Tensor, vocab_size: int) -> VocabularySplit:
    """The parts that `base_scalars` sums apart, on the support's device."""
    off_support_V = rest_mask(support_M, vocab_size)
    rest_is_gathered = 2 * len(support_M) > vocab_size
    gathered_V = off_support_V if rest_is_gathered else ~off_support_V
    penalty_V = torch.zeros(vocab_size, device=support_M.device).masked_fill(gathered_V, -math.inf)
    return VocabularySplit(gathered_V.nonzero().squeeze(-1), penalty_V, rest_is_gathered)


def base_scalars(logits_TV: Tensor, split: VocabularySplit) -> BaseScalars:
    """Entropy, log Z, R and A from the full scaled logits, without gradient. -inf logits count as probability 0."""
    pieces = logits_TV.detach().split(PIECE.rows(logits_TV.shape[-1], logits_TV.device))
    return joined([_piece_scalars(piece, split) for piece in pieces])


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """`u = z / T`, in float32 or better."""
    logits = at_least_float32(logits)
    return logits if temperature == 1 else logits / temperature


def scalars_at_temperature(logits_TV: Tensor, temperature: float, split: VocabularySplit) -> BaseScalars:
    """Log Z, R and A of `u = z / T`, and the entropy of the base as it is, at temperature 1, which the gate reads."""
    base = base_scalars(at_temperature(logits_TV, temperature), split)
    return base if temperature == 1 else replace(base, entropy=entropy_from_logits(logits_TV))


@dataclass(frozen=True)
class _PartSums:
    """Of one part's logits z, each (T,): their largest, `mass = sum e^c` and `moment = sum e^c c`, c = z - largest."""

    largest: Tensor
    mass: Tensor
    moment: Tensor


def _piece_scalars(logits_TV: Tensor, split: VocabularySplit) -> BaseScalars:
    logits_TV = at_least_float32(logits_TV)
    gathered = _part_sums(logits_TV.index_select(-1, split.gathered))
    masked = _part_sums(logits_TV + split.penalty)
    rest = gathered if split.rest_is_gathered else masked
    largest_T = _finite(torch.maximum(gathered.largest, masked.largest))
    mass_T, moment_T = torch.zeros_like(largest_T), torch.zeros_like(largest_T)
    for part in (gathered, masked):
        lower_T = (part.largest - largest_T).clamp(min=LOWEST_LOG_PROB)
        mass_T += lower_T.exp() * part.mass
        moment_T += lower_T.exp() * (part.moment + lower_T * part.mass)
    log_mass_T, shift_T = mass_T.log(), _finite(rest.largest).double()
    mean_T = torch.where(rest.mass > 0, rest.moment / rest.mass, 0)
    return BaseScalars(
        log_mass_T - moment_T / mass_T,
        log_mass_T.double() + largest_T.double(),
        RestScalars(rest.mass.log().double() + shift_T, mean_T.double() + shift_T),
    )


def _part_sums(logits_TN: Tensor) -> _PartSums:
    """Overwrites the logits. A part without tokens, or of -inf alone, has no mass."""
    if logits_TN.shape[-1] == 0:
        nothing_T = logits_TN.new_zeros(len(logits_TN))
        return _PartSums(nothing_T - math.inf, nothing_T, nothing_T)
    largest_T = logits_TN.amax(-1)
    centred_TN = logits_TN.sub_(_finite(largest_T)[:, None]).clamp_(min=LOWEST_LOG_PROB)
    mass_TN = centred_TN.exp()
    return _PartSums(largest_T, mass_TN.sum(-1), torch.linalg.vecdot(mass_TN, centred_TN))


def reduced_log_partition(logits_TM: Tensor, move_TM: Tensor, rest: RestScalars) -> tuple[Tensor, Tensor]:
    """`(shift, log Z' - shift)`, both (T,): the shift in the logits' type without gradient.

    The second carries the gradient to `move_TM` (T, M). `logits_TM` are the scaled base logits.
    """
    shift_T, relative_TM = _adapted(logits_TM, move_TM, rest)
    return shift_T, _log_partition(relative_TM, shift_T, rest)


def reduced_log_prob(
    logit_T: Tensor, column_T: Tensor, logits_TM: Tensor, move_TM: Tensor, rest: RestScalars
) -> Tensor:
    """`log pi'(y)` (T,) of the realised tokens, differentiable once, in `move_TM` alone.

    `logit_T` is the scaled base logit of y, `column_T` (int64) its column in the support, -1 where
    it has none.
    """
    return log_prob_from_adapted(logit_T, column_T, at_least_float32(logits_TM) + move_TM, rest)


def log_prob_from_adapted(logit_T: Tensor, column_T: Tensor, adapted_TM: Tensor, rest: RestScalars) -> Tensor:
    """`reduced_log_prob` from `u + d` (T, M) itself, differentiable once, in `adapted_TM` alone."""
    log_prob_T: Tensor = _ReducedLogProb.apply(adapted_TM, logit_T, column_T, rest.log_sum_exp)
    return log_prob_T


def log_prob_and_gradient(
    logit_T: Tensor, column_T: Tensor, adapted_TM: Tensor, rest: RestScalars
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`log_prob_from_adapted` (T,) without graph, and what makes weights (T,) the gradient of their sum.

    That is the gradient (T, M) of `sum weight_T log pi'(y)` by `adapted_TM`; it can be had once, being written over
    what it is made of.
    """
    within_TM, support_share_T, log_prob_T = _within_support(adapted_TM, logit_T, column_T, rest.log_sum_exp)
    return log_prob_T, lambda weight_T: _gradient_into(within_TM, within_TM, support_share_T, column_T, weight_T)


class _ReducedLogProb(torch.autograd.Function):
    """`u'_y - log Z'` with the gradient `1[y] - pi'` written out.

    Autograd would keep a tensor of T x M for each step of the sum; this keeps one, the softmax over
    the support alone, and scales it by the support's share of Z'.
    """

    @staticmethod
    def forward(ctx: Any, adapted_TM: Tensor, logit_T: Tensor, column_T: Tensor, rest_T: Tensor) -> Tensor:
        within_TM, support_share_T, log_prob_T = _within_support(adapted_TM, logit_T, column_T, rest_T)
        ctx.save_for_backward(within_TM, support_share_T, column_T)
        return log_prob_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None, None]:
        within_TM, support_share_T, column_T = ctx.saved_tensors
        gradient_TM = _gradient_into(torch.empty_like(within_TM), within_TM, support_share_T, column_T, gradient_T)
        return gradient_TM, None, None, None


def _within_support(
    adapted_TM: Tensor, logit_T: Tensor, column_T: Tensor, rest_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over the support alone (T, M), the support's share of Z' (T,), and `log pi'(y)` (T,).

    `u'` is rounded as the full softmax rounds it, so that y and log Z' have that error in common and it
    cancels alike.
    """
    largest_T = adapted_TM.amax(-1)
    empty_T = largest_T.isneginf()
    within_TM = adapted_TM.softmax(-1)
    if empty_T.any():
        within_TM[empty_T] = 0
    shift_T = torch.maximum(largest_T, rest_T.to(largest_T.dtype))
    support_T = torch.where(empty_T, -math.inf, (largest_T - shift_T) - within_TM.amax(-1).log())
    log_partition_T = torch.logaddexp(support_T, _relative(rest_T, shift_T))
    held_T = adapted_TM.gather(-1, column_T.clamp(min=0)[:, None]).squeeze(-1)
    log_prob_T = (torch.where(column_T >= 0, held_T, logit_T) - shift_T) - log_partition_T
    return within_TM, (support_T - log_partition_T).exp(), log_prob_T


def _gradient_into(
    place_TM: Tensor, within_TM: Tensor, support_share_T: Tensor, column_T: Tensor, weight_T: Tensor
) -> Tensor:
    """`weight (1[y] - pi')` (T, M), written into `place_TM`, which may be `within_TM` itself."""
    torch.mul(within_TM, (-weight_T * support_share_T)[:, None], out=place_TM)
    held_T = torch.where(column_T >= 0, weight_T, 0)
    return place_TM.scatter_add_(-1, column_T.clamp(min=0)[:, None], held_T[:, None])


def reduced_stats(logits_TM: Tensor, move_TM: Tensor, rest: RestScalars) -> PolicyStats:
    """Log-partition, entropy and exact KL to the base of the adapted policy, differentiable in `move_TM`."""
    shift_T, relative_TM = _adapted(logits_TM, move_TM, rest)
    log_partition_T = _log_partition(relative_TM, shift_T, rest)
    log_prob_TM = relative_TM - log_partition_T[:, None]
    prob_TM = log_prob_TM.exp()
    rest_prob_T = (_relative(rest.log_sum_exp, shift_T) - log_partition_T).exp()
    rest_mean_T = _relative(rest.mean_logit, shift_T) - log_partition_T
    rest_part_T = torch.where(rest_prob_T > 0, rest_prob_T * rest_mean_T, 0)
    support_part_T = (prob_TM * log_prob_TM).sum(-1)
    base_shift_T, base_T = reduced_log_partition(logits_TM, torch.zeros_like(move_TM), rest)
    change_T = (log_partition_T - base_T).double() + (shift_T.double() - base_shift_T.double())
    gap_TM = (move_TM.double() - change_T[:, None]).to(prob_TM.dtype)
    return PolicyStats(
        log_partition=log_partition_T.double() + shift_T.double(),
        entropy=-(rest_part_T + support_part_T),
        kl=(prob_TM * gap_TM).sum(-1) - rest_prob_T * change_T.to(prob_TM.dtype),
    )


def _adapted(logits_TM: Tensor, move_TM: Tensor, rest: RestScalars) -> tuple[Tensor, Tensor]:
    """A shift (T,) near the largest adapted logit, rest included, and `u + d - shift` (T, M).

    The second is kept finite: a support of -inf logits alone would have no gradient otherwise.
    """
    adapted_TM = logits_TM + move_TM.double()
    largest_T = torch.maximum(adapted_TM.detach().amax(-1), rest.log_sum_exp)
    shift_T = _finite(largest_T).to(torch.promote_types(logits_TM.dtype, torch.float32))
    return shift_T, _relative(adapted_TM, shift_T[:, None]).clamp(min=LOWEST_LOG_PROB)


def _log_partition(relative_TM: Tensor, shift_T: Tensor, rest: RestScalars) -> Tensor:
    return torch.logaddexp(_relative(rest.log_sum_exp, shift_T), relative_TM.logsumexp(-1))


def full_log_prob(logits_TV: Tensor, move_TM: Tensor, support_M: Tensor, token_T: Tensor) -> Tensor:
    """The plain reference of `reduced_log_prob`: log-softmax over the whole vocabulary, (T,)."""
    adapted_TV = logits_TV.index_add(-1, support_M, move_TM.to(logits_TV.dtype))
    return adapted_TV.log_softmax(-1).gather(-1, token_T[:, None]).squeeze(-1)


def full_stats(logits_TV: Tensor, move_TM: Tensor, support_M: Tensor) -> PolicyStats:
    """The plain reference of `reduced_stats`, over the whole vocabulary."""
    adapted_TV = logits_TV.index_add(-1, support_M, move_TM.to(logits_TV.dtype))
    log_prob_TV = adapted_TV.log_softmax(-1)
    prob_TV = log_prob_TV.exp()
    gap_TV = log_prob_TV - logits_TV.log_softmax(-1)
    return PolicyStats(
        log_partition=adapted_TV.logsumexp(-1),
        entropy=-torch.where(prob_TV > 0, prob_TV * log_prob_TV, 0).sum(-1),
        kl=torch.where(prob_TV > 0, prob_TV * gap_TV, 0).sum(-1),
    )


def fork_threshold(entropy_T: Tensor, rho: float = RHO) -> float:
    """The (1 - rho) quantile of base entropy over the given tokens; ties at it are forks.

    It is the entropy of the token whose rank is the share rho of all, rounded up. Raises ValueError
    without tokens, or where `rho` is not in (0, 1].
    """
    if len(entropy_T) == 0:
        raise UserError("no tokens to take the entropy threshold over")
    if not 0 < rho <= 1:
        raise UserError(f"`rho` is {rho}, a share of the tokens: it must be above 0 and at most 1")
    rank = math.ceil(rho * len(entropy_T) - _ROUNDING)
    return float(entropy_T.topk(max(rank, 1)).values[-1])


def fork_mass(logits_TV: Tensor, threshold: float) -> Tensor:
    """(V,) float64: the base's probability mass per token, summed over positions with `H >= threshold`."""
    forks_TV = at_least_float32(logits_TV[entropy_from_logits(logits_TV) >= threshold])
    return forks_TV.softmax(-1).double().sum(0)


def choose_support(mass_V: Tensor, size: int, always: Sequence[int] = ()) -> list[int]:
    """The `size` token ids of largest fork mass, ascending, `always` among them.

    `always` holds the ids that must be in whatever their mass: EOS, the end of a turn, training
    targets. Of equal masses the lower id goes first. Raises ValueError where `size` exceeds the
    vocabulary or cannot hold `always`, and where `always` has ids outside the vocabulary.
    """
    needed = set(always)
    outside = sorted(token for token in needed if not 0 <= token < len(mass_V))
    if outside:
        raise UserError(f"token id {outside[0]} is outside the vocabulary of {len(mass_V)} tokens")
    if not 1 <= size <= len(mass_V):
        raise UserError(f"a support of {size} tokens does not fit a vocabulary of {len(mass_V)}")
    if len(needed) > size:
        raise UserError(f"a support of {size} tokens cannot hold the {len(needed)} that must be in it")
    score_V = mass_V.clone()
    score_V[sorted(needed)] = math.inf
    return sorted(score_V.sort(descending=True, stable=True).indices[:size].tolist())


def coverage(mass_V: Tensor, support: Sequence[int]) -> float:
    """The share of fork mass that the support holds, in [0, 1]. Measure it on held-out text.

    Raises ValueError where there is no mass: the text had no forks.
    """
    if not float(mass_V.sum()) > 0:
        raise UserError("no fork mass to cover: the text has no token at or above the entropy threshold")
    return float(mass_V[list(support)].sum() / mass_V.sum())


def _relative(value: Tensor, shift: Tensor) -> Tensor:
    """`value - shift` of a float64 value, in the shift's type."""
    return (value - shift.double()).to(shift.dtype)


def _finite(shift_T: Tensor) -> Tensor:
    return torch.where(shift_T.isfinite(), shift_T, torch.zeros_like(shift_T))
