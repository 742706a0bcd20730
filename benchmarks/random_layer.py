"""A layer whose biases are random, so that no shortcut of a fresh layer applies."""

from __future__ import annotations

import torch
from torch import nn

from moe_bias.backbone import Head
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer


def random_layer(head: Head, config: LayerConfig, size: float) -> MoEBiasLayer:
    """Always the same one for the same arguments, on the head's device; each part gives biases of about `size`."""
    torch.manual_seed(0)
    layer = head.layer(config).to(head.device)
    if layer.experts is not None:
        nn.init.normal_(layer.experts, std=size)
    for part in (layer.directions, layer.writes):
        if part is not None:
            nn.init.normal_(part, std=size / float(head.rows(layer.support).norm(dim=-1).mean()))
    return layer
