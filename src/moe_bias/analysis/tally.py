"""Sums over tokens that merge: those of two parts of a text, added, are those of the whole.

A tally has a fixed size, however long the text. Sums are kept by group of examples, so that intervals can
resample them: a token's group is its example's row modulo `GROUPS`. With up to as many rows each example
is a group of its own; with more, groups of independent examples are resampled in place of examples, which
estimates the same spread.

Shapes: T tokens, K routed experts, E experts, G groups, S strata, Q quantities, B bins, C token classes, P places.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_bias.analysis.readings import TokenReadings
from moe_bias.analysis.token_classes import CLASSES

STRATA = ("high", "low")
QUANTITIES = (
    "base_entropy",
    "adapted_entropy",
    "kl",
    "weight",
    "bias_mean",
    "flipped",
    "mended",
    "spoiled",
    "base_right",
    "adapted_right",
    "log_prob_change",
)
"""Summed per token. `mended`: the choice flipped to the token that stands in the text; `spoiled`: away from it;
`base_right` and `adapted_right`: the choice is that token."""
GROUPS = 1024
ENTROPY_EDGES = (0.0, *torch.logspace(-4, 1.2, 53, dtype=torch.float64).tolist())
"""Edges in nats of the bins of entropy: ten a decade from 1e-4 to 15.8, above the entropy of 7 million tokens."""
PLACES = 16
"""Bins of a token's place in its completion: 0, 1, 2-3, 4-7, ..., the last one open."""


@dataclass(frozen=True)
class TokenFacts:
    """What tokens are sorted by, each (T,): row of the example, place in it, token id, its class, whether H >= tau."""

    example: Tensor
    position: Tensor
    token: Tensor
    kind: Tensor
    is_high: Tensor


@dataclass(frozen=True)
class Tally:
    """Sums (G, S, Q) float64 and tokens (G, S); largest |b| (S,); counts of entropies and of routed slots.

    `histogram` (2, B) counts base and adapted entropies, `by_stratum` (S, E), `by_class` (C, E) and
    `by_place` (P, E) routed (token, slot) pairs.
    """

    sums: Tensor
    tokens: Tensor
    bias_max: Tensor
    histogram: Tensor
    by_stratum: Tensor
    by_class: Tensor
    by_place: Tensor

    @classmethod
    def empty(cls, num_experts: int) -> Tally:
        """Of no tokens."""
        return cls(
            torch.zeros(GROUPS, len(STRATA), len(QUANTITIES), dtype=torch.float64),
            torch.zeros(GROUPS, len(STRATA), dtype=torch.int64),
            torch.zeros(len(STRATA), dtype=torch.float64),
            torch.zeros(2, len(ENTROPY_EDGES) - 1, dtype=torch.int64),
            *(torch.zeros(size, num_experts, dtype=torch.int64) for size in (len(STRATA), len(CLASSES), PLACES)),
        )

    @classmethod
    def of(cls, readings: TokenReadings, facts: TokenFacts, num_experts: int) -> Tally:
        """Of these tokens; all on the CPU."""
        tally = cls.empty(num_experts)
        stratum_T = (~facts.is_high).long()
        cell_T = facts.example % GROUPS * len(STRATA) + stratum_T
        tally.sums.view(-1, len(QUANTITIES)).index_add_(0, cell_T, quantities(readings, facts.token))
        tally.tokens.view(-1).index_add_(0, cell_T, torch.ones_like(cell_T))
        tally.bias_max.scatter_reduce_(0, stratum_T, readings.bias_max.double(), "amax")
        for row, entropy_T in zip(tally.histogram, (readings.base_entropy, readings.adapted_entropy), strict=True):
            row += entropy_bins(entropy_T).bincount(minlength=len(row))
        for table, label_T in (
            (tally.by_stratum, stratum_T),
            (tally.by_class, facts.kind),
            (tally.by_place, place_bins(facts.position)),
        ):
            slot_TK = label_T[:, None] * num_experts + readings.experts
            table += slot_TK.flatten().bincount(minlength=table.numel()).view_as(table)
        return tally

    def __add__(self, other: Tally) -> Tally:
        merged = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Tally)}
        return Tally(**merged | {"bias_max": torch.maximum(self.bias_max, other.bias_max)})


def quantities(readings: TokenReadings, token_T: Tensor) -> Tensor:
    """(T, Q) float64."""
    base_right_T, adapted_right_T = readings.base_choice == token_T, readings.adapted_choice == token_T
    columns = {
        "base_entropy": readings.base_entropy,
        "adapted_entropy": readings.adapted_entropy,
        "kl": readings.kl,
        "weight": readings.weight,
        "bias_mean": readings.bias_mean,
        "flipped": readings.flipped,
        "mended": readings.flipped & adapted_right_T,
        "spoiled": readings.flipped & base_right_T,
        "base_right": base_right_T,
        "adapted_right": adapted_right_T,
        "log_prob_change": readings.adapted_log_prob - readings.base_log_prob,
    }
    return torch.stack([columns[name].double() for name in QUANTITIES], dim=-1)


def entropy_bins(entropy_T: Tensor) -> Tensor:
    """(T,) int64: the bin of each entropy; what lies outside the edges is in the bin beside it."""
    edges = torch.tensor(ENTROPY_EDGES, dtype=torch.float64)
    return torch.bucketize(entropy_T.double(), edges[1:-1], right=True)


def place_bins(position_T: Tensor) -> Tensor:
    """(T,) int64: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ..."""
    starts = 2 ** torch.arange(PLACES - 1)
    return torch.bucketize(position_T, starts, right=True)
