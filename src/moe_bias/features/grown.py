"""Features on a support that tokens have come to, or gone from.

The rest loses the tokens that the support gains. With q_i = e^(z_i - R) the share of token i in the rest,

    R' = R + log(1 - sum_i q_i),    A' = (A - sum_i q_i z_i) / (1 - sum_i q_i)

Where they are more than half of the rest the differences would lose digits, and R and A are computed anew. It gains the
tokens g that the support loses: R' = log(e^R + sum_g e^(z_g)), and A' is the mean of both with their shares.

Shapes: T tokens, N tokens that come or go, V vocabulary, M support.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.features.extract import Features, support_columns
from moe_bias.support import RestScalars, base_scalars, split_vocabulary

_MOST_OF_THE_REST = 0.5


@torch.no_grad()
def grown(features: Features, head: Head, support_M: Tensor) -> Features:
    """The features on another support (M,) int64; on the CPU. It costs little where few tokens are in one alone."""
    coming_N = support_M[~torch.isin(support_M, features.support)]
    going_N = features.support[~torch.isin(features.support, support_M)]
    column_T = support_columns(support_M, head.vocab_size)[features.token]
    rest, hidden_TD = features.rest, features.hidden.to(head.device)
    dominated_D = torch.empty(0, dtype=torch.int64)
    if len(coming_N):
        rest, mass_T = _without(rest, head.columns(coming_N.to(head.device))(hidden_TD).cpu().double())
        dominated_D = (mass_T > _MOST_OF_THE_REST).nonzero().squeeze(-1)
    if len(going_N):
        rest = _with(rest, head.columns(going_N.to(head.device))(hidden_TD).cpu().double())
    if len(dominated_D):
        split = split_vocabulary(support_M.to(head.device), head.vocab_size)
        anew = base_scalars(head.logits(hidden_TD[dominated_D].to(head.dtype)), split).to("cpu").rest
        rest = RestScalars(
            rest.log_sum_exp.index_copy(0, dominated_D, anew.log_sum_exp),
            rest.mean_logit.index_copy(0, dominated_D, anew.mean_logit),
        )
    return replace(features, rest=rest, column=column_T, support=support_M)


def _with(rest: RestScalars, logits_TN: Tensor) -> RestScalars:
    """R' and A' with tokens of these logits in the rest."""
    sum_T = torch.logaddexp(rest.log_sum_exp, logits_TN.logsumexp(-1))
    share_T, share_TN = (rest.log_sum_exp - sum_T).exp(), (logits_TN - sum_T[:, None]).exp()
    return RestScalars(sum_T, share_T * rest.mean_logit + (share_TN * logits_TN).sum(-1))


def _without(rest: RestScalars, logits_TN: Tensor) -> tuple[RestScalars, Tensor]:
    """R' and A', which say nothing where the mass (T,) that goes is nearly all of the rest."""
    share_TN = (logits_TN - rest.log_sum_exp[:, None]).exp()
    mass_T = share_TN.sum(-1)
    left_T = (1 - mass_T).clamp(min=1e-3)
    mean_T = (rest.mean_logit - (share_TN * logits_TN).sum(-1)) / left_T
    return RestScalars(rest.log_sum_exp + left_T.log(), mean_T), mass_T
