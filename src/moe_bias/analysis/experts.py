"""What a trained layer says, read from its tensors.

Shapes: E experts, M support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class TokenBias(NamedTuple):
    """A token id and the bias that one expert gives it."""

    token: int
    bias: float


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens that one expert raises and lowers most, strongest first. A bias of 0 does neither."""

    raised: list[TokenBias]
    lowered: list[TokenBias]


def strongest_tokens(experts_EM: Tensor, support: Sequence[int] | Tensor | None, top: int) -> list[ExpertTokens]:
    """For each expert the `top` tokens it raises most and the `top` it lowers most.

    `support` holds the token id of each column (None: column m is token m).
    """
    ids = range(experts_EM.shape[-1]) if support is None else [int(token) for token in support]
    rows = experts_EM.detach()
    return [ExpertTokens(_largest(bias_M, ids, top, 1), _largest(bias_M, ids, top, -1)) for bias_M in rows]


def _largest(bias_M: Tensor, ids: Sequence[int], top: int, sign: int) -> list[TokenBias]:
    columns = (sign * bias_M).topk(min(top, len(bias_M))).indices.tolist()
    found = [TokenBias(ids[column], float(bias_M[column])) for column in columns]
    return [token for token in found if sign * token.bias > 0]
