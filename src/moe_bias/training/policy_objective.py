"""The objective of reinforcement learning as pure functions: GRPO with DAPO's clipping, on high-entropy tokens.

N samples in groups of G, one prompt a group; T tokens, each with the advantage of its sample:

    A_i = (R_i - mean) / std              in the group; groups of all equal rewards are dropped
    r_t = pi'(y_t) / pi_old(y_t)
    L = 1/N_sel sum_t 1[H_t >= tau] -min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t)
        + kl_weight mean KL(pi'|q) - entropy_weight mean H(pi') + load-balance weight L_lb

`N_sel` is the number of selected tokens (arXiv 2506.01939), and every mean is over them. All is at the
sampling temperature T: features hold u = z / T and its scalars, `logits_of` gives u_S, the support's
columns move by s b / T. The entropy gate alone reads the base entropy at temperature 1, as it does when
the layer generates.

Where this departs from TRL's GRPOTrainer with loss_type="dapo":

- the denominator: TRL divides by all valid tokens, also where `top_entropy_quantile` selects a share
  rho of them, so that its loss is about rho times this one; at rho = 1 they are equal;
- tau: TRL interpolates between two tokens' entropies, here it is the entropy of a token, so that at
  least the share rho of the tokens is selected;
- advantages: TRL adds 1e-4 to the standard deviation and keeps groups of all equal rewards: their
  tokens have advantage 0 there, but count in the denominator;
- KL: TRL estimates it from the sampled token, here it is exact.

Both take the sample standard deviation (denominator G - 1).

`policy_gradients.policy_gradients` is the same loss, its gradient gathered a chunk of tokens at a time.

Shapes: T tokens, N samples, P groups, G samples of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.layer import Routing, at_least_float32, load_balance_loss
from moe_bias.mistakes import UserError
from moe_bias.support import PolicyStats, fork_threshold

EPS_LOW, EPS_HIGH = 0.2, 0.28
"""How far the ratio of new to old probability may go below and above 1 (DAPO, arXiv 2503.14476)."""


@dataclass(frozen=True)
class PolicyTerms:
    """The sampling temperature, the clip range of the ratio, the weights of KL and entropy (0: left out)."""

    temperature: float = 1.0
    eps_low: float = EPS_LOW
    eps_high: float = EPS_HIGH
    kl_weight: float = 0.0
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature = {self.temperature}: it must be above 0")
        if not (0 <= self.eps_low < 1 and self.eps_high >= 0):
            raise UserError(
                f"the clip range 1 - {self.eps_low} to 1 + {self.eps_high} must hold 1 and begin above 0:"
                " eps_low from 0 to below 1, eps_high from 0"
            )

    @property
    def needs_stats(self) -> bool:
        """Whether entropy and KL of the whole distribution are part of the loss."""
        return self.kl_weight != 0 or self.entropy_weight != 0

    def weights(self, like: Tensor) -> Tensor:
        """What the means of policy loss, KL, entropy and clipped tokens count in the loss, (4,)."""
        return like.new_tensor([1.0, self.kl_weight, -self.entropy_weight, 0.0])


@dataclass(frozen=True)
class Sampled:
    """What is known of each token from when it was sampled, (T,): its log-probability, its sample's advantage."""

    log_prob: Tensor
    advantage: Tensor

    def at(self, index: Tensor | slice) -> Sampled:
        """The given tokens; a slice copies nothing."""
        return Sampled(self.log_prob[index], self.advantage[index])


@dataclass(frozen=True)
class AdaptedPolicy:
    """The policy now, of each token (T,): its log-probability, the routing, entropy and KL where they are wanted."""

    log_prob: Tensor
    routing: Routing
    stats: PolicyStats | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """`total` to minimise and its parts, unweighted; each is a mean over the selected tokens.

    `policy` is the clipped objective's negative; `kl` and `entropy` are in nats a token, and 0 where no
    weight asks for them; `clipped` is the share of tokens whose gradient the clip takes away; `tokens`
    the number of selected ones. `log_prob` (T,) and `routing` are of the tokens given, in this process.
    """

    total: Tensor
    policy: Tensor
    kl: Tensor
    entropy: Tensor
    clipped: Tensor
    load_balance: Tensor
    tokens: Tensor
    log_prob: Tensor
    routing: Routing


def group_advantages(reward_N: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`(advantage, kept)`, (N,) in float32 or better and (N,) bool; each run of `group` samples is of one prompt.

    Samples of a group whose rewards are all equal have advantage 0 and are not kept. Raises ValueError
    where the samples do not fill groups of two or more, and where a reward is not finite.
    """
    if group < 2 or len(reward_N) % group:
        raise UserError(f"{len(reward_N)} samples do not fill groups of {group}; a group has 2 samples or more")
    if not torch.isfinite(reward_N).all():
        raise UserError(f"reward {float(reward_N[~torch.isfinite(reward_N)][0])} is not finite")
    reward_PG = at_least_float32(reward_N).view(-1, group)
    kept_P1 = reward_PG.amax(-1, keepdim=True) > reward_PG.amin(-1, keepdim=True)
    scale_P1 = torch.where(kept_P1, reward_PG.std(-1, keepdim=True), 1)
    advantage_PG = (reward_PG - reward_PG.mean(-1, keepdim=True)) / scale_P1
    return torch.where(kept_P1, advantage_PG, 0).flatten(), kept_P1.expand_as(reward_PG).flatten()


def select_high_entropy(entropy_T: Tensor, share: float, valid_T: Tensor | None = None) -> tuple[Tensor, float]:
    """`(selected, tau)`: which tokens (T,) bool have an entropy of at least tau, and tau in nats.

    tau is the (1 - share) quantile over the valid tokens given (default all), and over no others: whoever
    wants one threshold for several batches or processes gives all their tokens together. Ties at tau
    are all selected; share 1 selects every valid token. Without a valid token none is selected and tau
    is infinite. Raises ValueError where `share` is not in (0, 1] or an entropy is not a number.
    """
    valid_T = torch.ones_like(entropy_T, dtype=torch.bool) if valid_T is None else valid_T.bool()
    if not valid_T.any():
        return valid_T, math.inf
    if entropy_T[valid_T].isnan().any():
        raise UserError("the entropies hold NaN, so no threshold can be taken; compute them in a wider type")
    threshold = fork_threshold(entropy_T[valid_T], share)
    return valid_T & (entropy_T >= threshold), threshold


def clipped_policy_loss(
    log_prob_T: Tensor,
    old_log_prob_T: Tensor,
    advantage_T: Tensor,
    eps_low: float = EPS_LOW,
    eps_high: float = EPS_HIGH,
) -> tuple[Tensor, Tensor]:
    """`-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)` of each token (T,), and which of them are clipped, bool.

    The minimum is `A min(r, 1 + eps_high)` for A >= 0 and `A max(r, 1 - eps_low)` for A < 0. It is
    taken before the exponential: a ratio that overflows then gives no NaN where it is clipped.
    """
    log_ratio_T = log_prob_T - old_log_prob_T.detach()
    highest, lowest = math.log1p(eps_high), math.log1p(-eps_low)
    bounded_T = torch.where(advantage_T >= 0, log_ratio_T.clamp(max=highest), log_ratio_T.clamp(min=lowest))
    clipped_T = ((log_ratio_T > highest) & (advantage_T > 0)) | ((log_ratio_T < lowest) & (advantage_T < 0))
    return -advantage_T * bounded_T.exp(), clipped_T


def policy_loss(
    adapted: AdaptedPolicy, sampled: Sampled, selected_T: Tensor, terms: PolicyTerms, load_balance_weight: float
) -> PolicyLoss:
    """The loss over the selected tokens, (T,) bool of those given; 0 without any. The others may hold anything."""
    tokens = selected_T.sum()
    stats = None if adapted.stats is None else _stats_at(adapted.stats, selected_T)
    means_4 = policy_means(adapted.log_prob[selected_T], stats, sampled.at(selected_T), tokens, terms)
    balance = load_balance_loss(adapted.routing, selected_T)
    return assembled_loss(means_4, balance, load_balance_weight, terms, tokens, adapted)


def policy_means(
    log_prob_T: Tensor, stats: PolicyStats | None, sampled: Sampled, tokens: Tensor, terms: PolicyTerms
) -> Tensor:
    """(4,): sums over the tokens given, divided by `tokens`, in the order of `PolicyTerms.weights`."""
    loss_T, clipped_T = clipped_policy_loss(
        log_prob_T, sampled.log_prob, sampled.advantage, terms.eps_low, terms.eps_high
    )
    if stats is None:
        kl_T = entropy_T = torch.zeros_like(loss_T)
    else:
        kl_T, entropy_T = stats.kl, stats.entropy
    return torch.stack([loss_T, kl_T, entropy_T, clipped_T.to(loss_T)]).sum(-1) / tokens.clamp(min=1)


def assembled_loss(
    means_4: Tensor,
    balance: Tensor,
    load_balance_weight: float,
    terms: PolicyTerms,
    tokens: Tensor,
    adapted: AdaptedPolicy,
) -> PolicyLoss:
    """The loss of these means and this load-balance loss."""
    total = means_4 @ terms.weights(means_4) + load_balance_weight * balance
    policy, kl, entropy, clipped = means_4.unbind()
    return PolicyLoss(total, policy, kl, entropy, clipped, balance, tokens, adapted.log_prob, adapted.routing)


def _stats_at(stats: PolicyStats, index: Tensor) -> PolicyStats:
    return PolicyStats(stats.log_partition[index], stats.entropy[index], stats.kl[index])
