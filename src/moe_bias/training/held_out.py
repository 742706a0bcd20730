"""Held-out likelihood while a layer trains, over several processes where there are several."""

from __future__ import annotations

import torch

from moe_bias.backbone import HeadTransform
from moe_bias.features.adapted import adapted_policy, chunks
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.source import FeatureSource
from moe_bias.layer import MoEBiasLayer
from moe_bias.training.processes import ALONE, Processes


@torch.no_grad()
def mean_nll(
    layer: MoEBiasLayer,
    source: FeatureSource,
    logits: BaseLogits,
    transform: HeadTransform,
    processes: Processes = ALONE,
) -> float:
    """Negative log-likelihood in nats per token of all the source's tokens under the layer.

    Each process takes every n-th chunk.
    """
    nll = torch.zeros((), dtype=torch.float64, device=layer.device)
    for rows in chunks(len(source), layer.table())[processes.rank :: processes.count]:
        batch = source.at(rows).to(layer.device)
        logits_TM = logits.of(torch.arange(rows.start, rows.start + len(batch)), batch)(slice(None))
        nll -= adapted_policy(layer, batch, logits_TM, transform).log_prob.double().sum()
    return float(processes.total(nll)) / len(source)
