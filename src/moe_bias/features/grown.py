"""Features on a support that tokens have come to.

The rest loses the tokens that the support gains. With q_i = e^(z_i - R) the share of token i in the rest,

    R' = R + log(1 - sum_i q_i),    A' = (A - sum_i q_i z_i) / (1 - sum_i q_i)

Where they are more than half of the rest the differences would lose digits, and R and A are computed anew.

Shapes: T tokens, N tokens that come, V vocabulary, M support.
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
    """The features on a support (M,) int64 that holds all tokens of theirs; on the CPU."""
    coming_N = support_M[~torch.isin(support_M, features.support)]
    column_T = support_columns(support_M, head.vocab_size)[features.token]
    if not len(coming_N):
        return replace(features, column=column_T, support=support_M)
    hidden_TD = features.hidden.to(head.device)
    logits_TN = head.columns(coming_N.to(head.device))(hidden_TD).cpu().double()
    rest, mass_T = _without(features.rest, logits_TN)
    dominated = (mass_T > _MOST_OF_THE_REST).nonzero().squeeze(-1)
    if len(dominated):
        split = split_vocabulary(support_M.to(head.device), head.vocab_size)
        anew = base_scalars(head.logits(hidden_TD[dominated].to(head.dtype)), split).to("cpu").rest
        rest = RestScalars(
            rest.log_sum_exp.index_copy(0, dominated, anew.log_sum_exp),
            rest.mean_logit.index_copy(0, dominated, anew.mean_logit),
        )
    return replace(features, rest=rest, column=column_T, support=support_M)


def _without(rest: RestScalars, logits_TN: Tensor) -> tuple[RestScalars, Tensor]:
    """R' and A', which say nothing where the mass (T,) that goes is nearly all of the rest."""
    share_TN = (logits_TN - rest.log_sum_exp[:, None]).exp()
    mass_T = share_TN.sum(-1)
    left_T = (1 - mass_T).clamp(min=1e-3)
    mean_T = (rest.mean_logit - (share_TN * logits_TN).sum(-1)) / left_T
    return RestScalars(rest.log_sum_exp + left_T.log(), mean_T), mass_T
