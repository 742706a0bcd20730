"""Features of an answer's tokens from hidden states that are there already.

Shapes: T tokens, C a chunk of them, D hidden, V vocabulary, M support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.columns import joined
from moe_bias.features.extract import Features, TokenScalars, chunk_rows, support_columns
from moe_bias.layer import MoEBiasLayer, at_least_float32
from moe_bias.support import at_temperature, scalars_at_temperature, split_vocabulary


@torch.no_grad()
def features_of_tokens(
    head: Head, layer: MoEBiasLayer, hidden_TD: Tensor, token_T: Tensor, temperature: float
) -> Features:
    """Features of one example on the layer's support, on the CPU, at a temperature: see `ServedAnswer`."""
    support_M = layer.support_or_all().to(head.device)
    split, rows, parts = split_vocabulary(support_M, head.vocab_size), chunk_rows(head), []
    for hidden_CD, token_C in zip(hidden_TD.split(rows), token_T.split(rows), strict=True):
        logits_CV = head.logits(hidden_CD.to(head.device, head.dtype))
        logit_C = logits_CV.gather(-1, token_C.to(head.device)[:, None]).squeeze(-1)
        base = scalars_at_temperature(logits_CV, temperature, split)
        parts.append(TokenScalars(at_temperature(logit_C, temperature), base))
    scalars = joined(parts).to("cpu")
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
