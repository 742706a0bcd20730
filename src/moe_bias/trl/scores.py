"""Per-token quantities of the adapted model for TRL: from what is kept of the frozen one, never over the vocabulary.

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` and read from the output log-probabilities, entropy,
whether the label is the likeliest token, the mean logit and log sum p^2, all of softmax(logits / T). With u' = u + d on
the support and R, the largest and the log-sum of squares of the rest (see `support`):

    log sum p'^2 = log(exp(rest_squares) + sum_S exp(2 u')) - 2 log Z'        mean u' = mean u + sum_S d / V

Shapes: T tokens, C a chunk of them, M support, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_bias.backbone import Head
from moe_bias.columns import Columns, joined
from moe_bias.features.adapted import chunks
from moe_bias.layer import LOWEST_LOG_PROB, MoEBiasLayer, Routing
from moe_bias.support import at_temperature, log_prob_from_adapted, reduced_stats
from moe_bias.trl.states import Seen


@dataclass(frozen=True)
class Scores(Columns):
    """Of each token (T,), at the temperature: in nats `log_prob`, which has a gradient, and `entropy`; without one
    `is_top1` (bool), `mean_logit` and `log_sum_squares`.
    """

    log_prob: Tensor
    entropy: Tensor
    is_top1: Tensor
    mean_logit: Tensor
    log_sum_squares: Tensor


def scores_of(
    layer: MoEBiasLayer | None, head: Head, seen: Seen, temperature: float, entropy_has_gradient: bool = False
) -> tuple[Scores, Routing | None]:
    """The tokens under a layer, and their routing; of the frozen model for None.

    Where more tokens than one chunk have a gradient, what is as wide as the support is made again for it.
    """
    features = seen.features
    columns = head.columns(features.support)
    if layer is None:
        table_CM = features.hidden.new_zeros(1, len(features.support), dtype=torch.float32)
        coefficients_TC, routing = table_CM.new_zeros(len(seen), 1), None
        strength = 1.0
    else:
        mixture = layer.mix(features.hidden, features.entropy)
        table_CM, coefficients_TC, routing = layer.table(), mixture.coefficients, mixture.routing
        strength = layer.strength

    def score(coefficients_TC: Tensor, table_CM: Tensor, rows: slice) -> tuple[Tensor, ...]:
        part = seen.at(rows)
        u_TM = at_temperature(columns(part.features.hidden), temperature)
        bias_TM = (strength * coefficients_TC) @ table_CM.to(coefficients_TC.dtype)
        move_TM = at_temperature(head.transform.reachable(temperature * u_TM, bias_TM), temperature)
        return _scored(part, u_TM, move_TM, entropy_has_gradient, head.vocab_size)

    slices = chunks(len(seen), table_CM)
    again = torch.is_grad_enabled() and len(slices) > 1
    parts = [
        checkpoint(score, coefficients_TC[rows], table_CM, rows, use_reentrant=False)
        if again
        else score(coefficients_TC[rows], table_CM, rows)
        for rows in slices
    ]
    return joined([Scores(*part) for part in parts]), routing


def _scored(
    part: Seen, u_TM: Tensor, move_TM: Tensor, entropy_has_gradient: bool, vocab_size: int
) -> tuple[Tensor, ...]:
    """The fields of `Scores`, for scaled base logits and moves (T, M)."""
    features = part.features
    adapted_TM = u_TM + move_TM
    log_prob_T = log_prob_from_adapted(features.logit, features.column, adapted_TM, features.rest)
    with torch.no_grad():
        held_T = adapted_TM.gather(-1, features.column.clamp(min=0)[:, None]).squeeze(-1)
        own_T = torch.where(features.column >= 0, held_T, features.logit)
        largest_T = torch.maximum(adapted_TM.amax(-1), part.rest_largest)
        mean_T = part.mean_logit + move_TM.sum(-1) / vocab_size
        entropy_T, squares_T = _moments(part, adapted_TM)
    if entropy_has_gradient:
        entropy_T = reduced_stats(u_TM, move_TM, features.rest).entropy
    return log_prob_T, entropy_T, own_T >= largest_T, mean_T, squares_T


def _moments(part: Seen, adapted_TM: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log sum p^2 (T,) of the whole distribution, from one exponential a token and column.

    With c = u' - s, s the largest of u' and R: H = log Z' - s - sum p c, of which the rest is exp(R - s) (A - s) / Z'.
    """
    rest = part.features.rest
    shift_T = torch.maximum(adapted_TM.amax(-1), rest.log_sum_exp.to(adapted_TM.dtype))
    centred_TM = (adapted_TM - shift_T[:, None]).clamp_(min=LOWEST_LOG_PROB)
    mass_TM = centred_TM.exp()
    rest_T = (rest.log_sum_exp - shift_T).exp()
    partition_T = mass_TM.sum(-1).double() + rest_T
    moment_T = torch.linalg.vecdot(mass_TM, centred_TM).double() + rest_T * (rest.mean_logit - shift_T)
    squares_T = torch.linalg.vecdot(mass_TM, mass_TM).double() + (part.rest_squares - 2 * shift_T).exp()
    entropy_T = partition_T.log() - moment_T / partition_T
    return entropy_T.to(adapted_TM.dtype), (squares_T.log() - 2 * partition_T.log()).to(adapted_TM.dtype)
