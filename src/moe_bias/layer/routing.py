"""What the router decides, and the loss that spreads tokens over the experts.

Shapes: T tokens (any leading shape where a docstring says `...`), E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What the router decided for each token: `probs` and `gates`, both (..., E); gates sum to 1."""

    probs: Tensor
    gates: Tensor


def itself(tensor: Tensor) -> Tensor:
    """The sum over the processes where there is one."""
    return tensor


def load_balance_loss(
    routing: Routing, counted: Tensor | None = None, total: Callable[[Tensor], Tensor] = itself
) -> Tensor:
    """Switch load-balance loss `E sum_e f_e P_e` (arXiv 2101.03961), a scalar; 1 when uniform.

    `f_e` is the share of routed (token, slot) pairs that go to expert e, `P_e` its mean router
    probability. `counted` (...,) bool names the tokens that count in the loss (default all);
    with none the loss is 0. Where the batch is spread over processes, `total` sums a tensor over
    them, and the result is this process's summand of the loss.
    """
    num_experts = routing.probs.shape[-1]
    probs_TE = routing.probs.reshape(-1, num_experts)
    routed_TE = (routing.gates > 0).reshape(-1, num_experts).to(probs_TE.dtype)
    weight_T = probs_TE.new_ones(len(probs_TE)) if counted is None else counted.flatten().to(probs_TE.dtype)
    routed_E = total(weight_T @ routed_TE)
    share_E = routed_E / routed_E.sum().clamp(min=1)
    mean_E = (weight_T @ probs_TE) / total(weight_T.sum()).clamp(min=1)
    return num_experts * (share_E * mean_E).sum()
