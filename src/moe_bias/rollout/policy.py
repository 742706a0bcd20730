"""Policies: what turns the frozen model's logits into those that tokens are chosen from.

Shapes: B rows, D hidden, V vocabulary, M support.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_bias.backbone import Head, HeadTransform, adapted_logits
from moe_bias.combined import Part, summed_logits
from moe_bias.layer import MoEBiasLayer, entropy_from_logits

Policy = Callable[[Tensor, Tensor], Tensor]
"""From hidden states (B, D) and final base logits (B, V), which it leaves alone, to the policy's logits (B, V)."""
Pick = Callable[[Tensor, Tensor], Tensor]
"""From a policy's logits (B, V) and the places (B,) of their rows in the batch to tokens (B,)."""


def base_policy(hidden_BD: Tensor, logits_BV: Tensor) -> Tensor:
    """The frozen model as it is."""
    return logits_BV


def layer_policy(layer: MoEBiasLayer, transform: HeadTransform) -> Policy:
    """The frozen model under a MoE-Bias layer."""

    def policy(hidden_BD: Tensor, logits_BV: Tensor) -> Tensor:
        return adapted_logits(layer, transform, hidden_BD, entropy_from_logits(logits_BV), logits_BV)

    return policy


def summed_policy(parts: Sequence[Part], transform: HeadTransform) -> Policy:
    """The frozen model under several MoE-Bias layers, whose biases add; as it is under none."""
    if not parts:
        return base_policy

    def policy(hidden_BD: Tensor, logits_BV: Tensor) -> Tensor:
        return summed_logits(parts, transform, hidden_BD, entropy_from_logits(logits_BV), logits_BV)

    return policy


def tokens_by_policy(head: Head, hidden_BD: Tensor, policy_B: Tensor, policies: Sequence[Policy], pick: Pick) -> Tensor:
    """The next token of each row (B,), picked from the logits of the row's own policy, whose number `policy_B` has."""
    logits_BV = head.logits(hidden_BD)
    token_B = torch.zeros_like(policy_B)
    for number, policy in enumerate(policies):
        mine = (policy_B == number).nonzero().squeeze(-1)
        if len(mine):
            token_B[mine] = pick(policy(hidden_BD[mine], logits_BV[mine]), mine)
    return token_B
