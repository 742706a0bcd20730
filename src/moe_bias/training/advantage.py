"""Which samples are worth more than others, and which of their tokens to learn from.

N samples in groups of G, one prompt a group:

    A_i = (R_i - mean) / std              in the group; groups of all equal rewards are dropped

Departures from TRL's GRPOTrainer: TRL adds 1e-4 to the standard deviation and keeps groups of all equal rewards, whose
tokens have advantage 0 there but count in the denominator; it divides by the standard deviation however small that is,
here a reward of length bounds it from below (`LengthAdvantages`); its threshold of entropy is interpolated between
two tokens', here it is the entropy of a token, so that at least the share rho of the tokens is selected. Both take
the sample standard deviation (denominator G - 1).

Shapes: T tokens, N samples, P groups, G samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.layer import at_least_float32
from moe_bias.mistakes import UserError
from moe_bias.support import fork_threshold

Advantage = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From rewards (N,) and G to advantages (N,) and which samples are kept, (N,) bool; runs of G are of one prompt."""


def group_advantages(reward_N: Tensor, group: int, least_std: float = 0.0) -> tuple[Tensor, Tensor]:
    """`(advantage, kept)`, (N,) in float32 or better and (N,) bool; each run of `group` samples is of one prompt.

    Samples of a group whose rewards are all equal have advantage 0 and are not kept. Others are divided by their
    group's standard deviation, or by `least_std` where that is larger. Raises ValueError
    where the samples do not fill groups of two or more, and where a reward is not finite.
    """
    if group < 2 or len(reward_N) % group:
        raise UserError(f"{len(reward_N)} samples do not fill groups of {group}; a group has 2 samples or more")
    if not torch.isfinite(reward_N).all():
        raise UserError(f"reward {float(reward_N[~torch.isfinite(reward_N)][0])} is not finite")
    reward_PG = at_least_float32(reward_N).view(-1, group)
    kept_P1 = reward_PG.amax(-1, keepdim=True) > reward_PG.amin(-1, keepdim=True)
    scale_P1 = torch.where(kept_P1, reward_PG.std(-1, keepdim=True).clamp(min=least_std), 1)
    advantage_PG = (reward_PG - reward_PG.mean(-1, keepdim=True)) / scale_P1
    return torch.where(kept_P1, advantage_PG, 0).flatten(), kept_P1.expand_as(reward_PG).flatten()


@dataclass(frozen=True)
class LengthAdvantages:
    """Group advantages of rewards that fall with length, of which `earned_share` is shaped by it.

    Samples of a group that is all right differ in length alone. Divided by their own standard deviation they would
    teach length as hard as others teach what is right, whatever a token costs. So none is divided by less than the
    standard deviation of a group with a single right answer, earned_share / sqrt(G): no group of rewards 0 and 1 has a
    smaller one, and without a penalty advantages are what they are without the bound.
    """

    earned_share: float = 1.0

    def __call__(self, reward_N: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """As `group_advantages` returns them."""
        return group_advantages(reward_N, group, self.earned_share / math.sqrt(max(group, 1)))


def select_high_entropy(entropy_T: Tensor, rho: float, valid_T: Tensor | None = None) -> tuple[Tensor, float]:
    """`(selected, tau)`: which tokens (T,) bool have an entropy of at least tau, and tau in nats.

    tau is the (1 - rho) quantile over the valid tokens given (default all), and over no others: whoever
    wants one threshold for several batches or processes gives all their tokens together. Ties at tau
    are all selected; rho 1 selects every valid token. Without a valid token none is selected and tau
    is infinite. Raises ValueError where `rho` is not in (0, 1] or an entropy is not a number.
    """
    valid_T = torch.ones_like(entropy_T, dtype=torch.bool) if valid_T is None else valid_T.bool()
    if not valid_T.any():
        return valid_T, math.inf
    if entropy_T[valid_T].isnan().any():
        raise UserError("the entropies hold NaN, so no threshold can be taken; compute them in a wider type")
    threshold = fork_threshold(entropy_T[valid_T], rho)
    return valid_T & (entropy_T >= threshold), threshold


def check_advantages(advantage_N: Tensor, kept_N: Tensor, reward_N: Tensor) -> None:
    """Raises UserError where these are not finite advantages and kept samples of the rewards (N,)."""
    shapes = [tuple(one.shape) for one in (advantage_N, kept_N)]
    if shapes != [tuple(reward_N.shape)] * 2 or kept_N.dtype != torch.bool:
        raise UserError(
            f"the advantages of {len(reward_N)} samples have shape {shapes[0]}, and which are kept {kept_N.dtype} of "
            f"shape {shapes[1]}; needed are one number and one bool for each sample"
        )
    if not torch.isfinite(advantage_N[kept_N]).all():
        raise UserError("an advantage is not finite")
