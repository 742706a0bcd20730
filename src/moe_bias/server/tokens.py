"""Features of an answer's tokens from hidden states that are there already.

Shapes: T tokens, D hidden, M support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.features.extract import Features, support_columns, token_scalars
from moe_bias.layer import MoEBiasLayer, at_least_float32
from moe_bias.support import split_vocabulary


@torch.no_grad()
def features_of_tokens(head: Head, layer: MoEBiasLayer, hidden_TD: Tensor, token_T: Tensor) -> Features:
    """Features of one example on the layer's support, on the CPU, at temperature 1."""
    support_M = layer.support_or_all().to(head.device)
    split = split_vocabulary(support_M, head.vocab_size)
    scalars = token_scalars(head, hidden_TD.to(head.device), token_T.to(head.device), split)
    return Features(
        at_least_float32(hidden_TD).cpu(),
        token_T.cpu(),
        torch.zeros(len(token_T), dtype=torch.int64),
        torch.arange(len(token_T)),
        scalars.logit.float(),
        scalars.base.entropy.float(),
        scalars.base.log_partition,
        scalars.base.rest,
        support_columns(support_M.cpu(), head.vocab_size)[token_T.cpu()],
        support_M.cpu(),
    )
