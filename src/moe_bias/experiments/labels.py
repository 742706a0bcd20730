"""Ways to choose among labels as they were measured, compared on the same texts.

A cell is a way at a number of labelled texts and a seed, which draws them. Of cells of one way at one number accuracy,
NLL and calibration error are means over the seeds; intervals are over the texts that were measured on, and differences
are paired by text, over the seeds that both ways were run with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_bias.evaluation.calibration import calibration_change, calibration_error
from moe_bias.evaluation.statistics import Estimate, Floats, mean, share

ZERO_SHOT, MAIN = "zero-shot", "moe-bias"


@dataclass(frozen=True)
class LabelCell:
    """A way at a number of labels and a seed: `log_prob` (N, K) of each text's labels, and what it took.

    `seconds` are of the training with what was chosen, `search_seconds` of choosing. Ways that learn nothing have 0
    labels.
    """

    way: str
    count: int
    seed: int
    log_prob: list[list[float]]
    seconds: float
    search_seconds: float
    parameters: int
    choice: dict[str, Any]

    @property
    def name(self) -> str:
        """By which its record is found."""
        return arm_name(self.way, self.count)


@dataclass(frozen=True)
class LabelRow:
    """A way at a number of labels, over its seeds. `accuracy` and `ece` are shares, `nll` is in nats per text.

    By quantity, `change` is this way less zero-shot, and `lead` is MoE-Bias at the same number less this way; each is
    None where there is nothing to compare with.
    """

    way: str
    count: int
    seeds: int
    parameters: int
    seconds: float
    search_seconds: float
    accuracy: Estimate
    nll: Estimate
    ece: Estimate
    change: dict[str, Estimate] | None
    lead: dict[str, Estimate] | None
    choices: list[dict[str, Any]]


def arm_name(way: str, count: int) -> str:
    """What a way with so many labels is called."""
    return f"{way}-{count}"


def compare_labels(cells: Sequence[LabelCell], gold: Sequence[int]) -> list[LabelRow]:
    """A row for each way and number of labels, in order of appearance; `gold` are the numbers of the right labels."""
    groups: dict[tuple[str, int], list[LabelCell]] = {}
    for cell in cells:
        groups.setdefault((cell.way, cell.count), []).append(cell)
    gold_N = np.asarray(gold)
    return [_row(group, groups, gold_N) for group in groups.values()]


def _row(group: list[LabelCell], groups: Mapping[tuple[str, int], list[LabelCell]], gold_N: Floats) -> LabelRow:
    first, prob_SNK = group[0], _probs(group)
    zero, main = groups.get((ZERO_SHOT, 0)), groups.get((MAIN, first.count))
    right_N, loss_N = _right(prob_SNK, gold_N), _loss(group, gold_N)
    return LabelRow(
        first.way,
        first.count,
        len(group),
        first.parameters,
        float(np.mean([cell.seconds for cell in group])),
        float(np.mean([cell.search_seconds for cell in group])),
        share(right_N) if len(group) == 1 else mean(right_N),
        mean(loss_N),
        calibration_error(prob_SNK, gold_N),
        _difference(group, zero, gold_N) if zero is not None and first.way != ZERO_SHOT else None,
        _difference(*_common(main, group), gold_N) if main is not None and first.way != MAIN else None,
        [cell.choice for cell in group],
    )


def _common(one: list[LabelCell], other: list[LabelCell]) -> tuple[list[LabelCell], list[LabelCell]]:
    """Cells of the seeds that both have; all of both where there are none."""
    shared = {cell.seed for cell in one} & {cell.seed for cell in other}
    if not shared:
        return one, other
    return [cell for cell in one if cell.seed in shared], [cell for cell in other if cell.seed in shared]


def _difference(group: list[LabelCell], other: list[LabelCell], gold_N: Floats) -> dict[str, Estimate]:
    after_SNK, before_SNK = _probs(group), _probs(other)
    return {
        "accuracy": mean(_right(after_SNK, gold_N) - _right(before_SNK, gold_N)),
        "nll": mean(_loss(group, gold_N) - _loss(other, gold_N)),
        "ece": calibration_change(after_SNK, before_SNK, gold_N),
    }


def _probs(group: Sequence[LabelCell]) -> Floats:
    """(S, N, K), each row summing to 1."""
    return np.exp(np.array([cell.log_prob for cell in group], dtype=np.float64))


def _right(prob_SNK: Floats, gold_N: Floats) -> Floats:
    """Of each text, the share of the seeds that choose its label."""
    right: Floats = (prob_SNK.argmax(-1) == gold_N).mean(0)
    return right


def _loss(group: Sequence[LabelCell], gold_N: Floats) -> Floats:
    """Negative log-likelihood of each text's label in nats, the mean over seeds."""
    log_prob_SNK = np.array([cell.log_prob for cell in group], dtype=np.float64)
    loss: Floats = -log_prob_SNK[:, np.arange(len(gold_N)), gold_N].mean(0)
    return loss
