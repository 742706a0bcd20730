"""What a survey's counts say: means with intervals, use of the experts, mutual information, overlap.

Mutual information is of the expert of a routed slot with a property of its token, in nats, by counts:
I = sum_xe p(x, e) log( p(x, e) / p(x) p(e) ). With N slots and small tables its upward bias is about
(X - 1)(E - 1) / 2N. Beside it stands the most that it could be, the smaller of both entropies.

Shapes: E experts, G groups, S strata, Q quantities, X values of a property.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_bias.analysis.survey import Overlap
from moe_bias.analysis.tally import QUANTITIES, STRATA, Tally
from moe_bias.evaluation.statistics import Estimate, ratio_of_sums

ALL = "all"


@dataclass(frozen=True)
class MutualInformation:
    """`nats` of it, and the most that there could be."""

    nats: float
    at_most: float


@dataclass(frozen=True)
class StratumSummary:
    """One stratum: tokens, means by quantity with intervals over examples, and the experts' shares of routed slots.

    `bias_max` is the largest |b|, `expert_entropy` the entropy of the shares in nats.
    """

    tokens: int
    means: dict[str, Estimate]
    bias_max: float
    expert_share: list[float]
    expert_entropy: float


def by_stratum(tally: Tally) -> dict[str, StratumSummary]:
    """All tokens, the high ones and the low ones; a stratum without tokens is left out."""
    chosen = {ALL: [0, 1]} | {name: [number] for number, name in enumerate(STRATA)}
    return {name: _stratum(tally, rows) for name, rows in chosen.items() if int(tally.tokens[:, rows].sum())}


def _stratum(tally: Tally, rows: list[int]) -> StratumSummary:
    sums_GQ, tokens_G = tally.sums[:, rows].sum(1), tally.tokens[:, rows].sum(1)
    slots_E = tally.by_stratum[rows].sum(0).double()
    share_E = slots_E / slots_E.sum()
    return StratumSummary(
        int(tokens_G.sum()),
        {name: mean_over_groups(sums_GQ[:, number], tokens_G) for number, name in enumerate(QUANTITIES)},
        float(tally.bias_max[rows].max()),
        share_E.tolist(),
        float(torch.special.entr(share_E).sum()),
    )


def mean_over_groups(sums_G: Tensor, tokens_G: Tensor) -> Estimate:
    """Sums by token; resampled are the groups that have tokens. With one group alone the interval is unbounded."""
    held_G = tokens_G > 0
    sums, tokens = sums_G[held_G].double().numpy(), tokens_G[held_G].double().numpy()
    if len(tokens) < 2:
        value = float(sums.sum() / tokens.sum())
        return Estimate(value, -np.inf, np.inf)
    return ratio_of_sums(sums, tokens)


def overlap_share(found: Overlap) -> Estimate:
    """The share of the base's high tokens that are the adapted model's too."""
    return mean_over_groups(found.both, found.high)


def mutual_information(tally: Tally) -> dict[str, MutualInformation]:
    """Of the expert with the stratum, with the class of the token and with its place in the answer."""
    tables = {"stratum": tally.by_stratum, "class": tally.by_class, "place": tally.by_place}
    return {name: information(table) for name, table in tables.items()}


def information(counts_XE: Tensor) -> MutualInformation:
    """Of the two properties that a table of counts is over; 0 of an empty table."""
    joint_XE = counts_XE.double() / counts_XE.sum().clamp(min=1)
    of_x, of_e = (float(torch.special.entr(joint_XE.sum(axis)).sum()) for axis in (1, 0))
    of_both = float(torch.special.entr(joint_XE).sum())
    return MutualInformation(max(of_x + of_e - of_both, 0.0), min(of_x, of_e))


def share_by_row(counts_XE: Tensor, names: Sequence[str]) -> dict[str, list[float]]:
    """Of each value of a property the experts' shares of its routed slots; values without tokens are left out."""
    rows = {names[number]: row for number, row in enumerate(counts_XE) if int(row.sum())}
    return {name: (row.double() / row.sum()).tolist() for name, row in rows.items()}
