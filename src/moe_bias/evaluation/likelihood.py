"""Held-out negative log-likelihood from features: no backbone is run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_bias.backbone import Head, adapted_logits
from moe_bias.chunks import CHUNK_TOKENS
from moe_bias.evaluation.statistics import Floats
from moe_bias.features.adapted import adapted_policy, chunks
from moe_bias.features.extract import Features
from moe_bias.features.source import FeatureSource
from moe_bias.layer import MoEBiasLayer
from moe_bias.support import reduced_log_prob


@torch.no_grad()
def token_nll(layer: MoEBiasLayer | None, features: FeatureSource, head: Head) -> Tensor:
    """Negative log-likelihood in nats of each token (T,) under the layer, or under the base for None."""
    logits_of = head.columns(features.support)
    parts = []
    for index in torch.arange(len(features)).split(CHUNK_TOKENS):
        batch = features.at(index).to(head.device)
        if layer is not None and layer.reach == "vocabulary":
            parts.append(-_log_prob_everywhere(layer, batch, head).cpu())
            continue
        logits_TM = logits_of(batch.hidden)
        if layer is None:
            still_TM = torch.zeros_like(logits_TM)
            log_prob_T = reduced_log_prob(batch.logit, batch.column, logits_TM, still_TM, batch.rest)
        else:
            log_prob_T = adapted_policy(layer, batch, logits_TM, head.transform).log_prob
        parts.append(-log_prob_T.cpu())
    return torch.cat(parts)


def _log_prob_everywhere(layer: MoEBiasLayer, batch: Features, head: Head) -> Tensor:
    """`log pi'(y)` (T,) of a layer that acts on more tokens than the features' support."""
    parts = []
    for rows in chunks(len(batch), layer.table()):
        part = batch.at(rows)
        logits_TV = head.logits(part.hidden.to(head.dtype))
        adapted_TV = adapted_logits(layer, head.transform, part.hidden, part.entropy, logits_TV)
        parts.append(adapted_TV.log_softmax(-1).gather(-1, part.token[:, None]).squeeze(-1))
    return torch.cat(parts)


def per_example(values_T: Tensor, features: Features) -> Floats:
    """Sums over each example's tokens, as float64."""
    return np.bincount(features.example.numpy(), weights=values_T.double().numpy()).astype(np.float64)
