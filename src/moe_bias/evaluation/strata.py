"""Held-out tokens apart by the entropy of the base model: high is the top 20%, ties included; low the rest.

Shapes: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_bias.evaluation.likelihood import per_example
from moe_bias.evaluation.statistics import Floats
from moe_bias.features.extract import Features
from moe_bias.support import fork_threshold

STRATA = ("all", "high", "low")


def by_stratum(values_T: Tensor, features: Features) -> dict[str, Floats]:
    """Sums over each example's tokens of each stratum; the same entropies give the same strata."""
    high_T = features.entropy >= fork_threshold(features.entropy)
    masks = {"all": torch.ones_like(high_T), "high": high_T, "low": ~high_T}
    return {name: per_example(values_T * masks[name], features) for name in STRATA}


def counts_by_stratum(features: Features) -> dict[str, Floats]:
    """How many tokens of each stratum each example has."""
    return by_stratum(torch.ones(len(features)), features)
