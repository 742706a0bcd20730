"""A small supervised training: a head, random features, a fresh layer, settings, and the metrics written."""

import json

import torch

from helpers.models import HIDDEN, VOCABULARY, tiny_model
from moe_bias.backbone import find_head
from moe_bias.commands.training_settings import TrainSFTSettings
from moe_bias.config import LayerConfig
from moe_bias.features.extract import Features, HiddenTokens, with_scalars
from moe_bias.layer import MoEBiasLayer

SUPPORT = list(range(2, 60))


def head_of(name="llama"):
    return find_head(tiny_model(name))[1]


def features_of(head, tokens=61, support=SUPPORT) -> Features:
    """Random hidden states whose next token depends on them, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, HIDDEN, generator=generator)
    token_T = torch.where(hidden_TD[:, 0] > 0, 7, torch.where(hidden_TD[:, 1] > 0, 30, 80))
    return with_scalars(head, HiddenTokens(hidden_TD, token_T, torch.arange(tokens) // 7), support, "test")


def layer_of(support=SUPPORT, **choices) -> MoEBiasLayer:
    torch.manual_seed(0)
    config = LayerConfig(
        **{"experts": "free", "num_experts": 4, "support": None if support is None else tuple(support), **choices}
    )
    return MoEBiasLayer(config, HIDDEN, VOCABULARY)


def run_settings(folder, **changes) -> TrainSFTSettings:
    small = {"epochs": 3, "batch_tokens": 16, "checkpoint_every": 2, "data": "none", "output": folder}
    return TrainSFTSettings(**{**small, **changes})


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
