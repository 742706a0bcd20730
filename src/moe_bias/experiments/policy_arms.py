"""Arms of the comparison by reinforcement learning: what each is, what it was measured to do, and the table.

The names:

    base                    the frozen model
    first-token             one bias vector, on the first token of an answer alone (arXiv 2509.06608)
    static                  one expert without a gate: a plain vector of logit biases
    no-gate                 MoE-Bias without the entropy gate
    moe-bias                MoE-Bias on the share rho of highest entropy
    moe-bias-all-tokens     the same on all tokens (DAPO, arXiv 2503.14476)
    moe-bias-sft            MoE-Bias that goes on with worked answers, of the problems that RL has in a step
    lora                    LoRA on all linear layers by TRL's GRPOTrainer, all tokens
    lora-high-entropy       the same on the share rho of highest entropy (RLVR-High-Entropy, arXiv 2506.01939)
    lora-sft                LoRA that goes on with worked answers

All arms have the same problems, samples per step, steps and seeds, and the same worked answers to
learn the form of an answer from; the frozen model has none. Units are the held-out problems, and what is measured of
them is whether they are solved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_bias.evaluation.statistics import Estimate, Floats, mean, share
from moe_bias.experiments.arm import by_name, over_seeds
from moe_bias.mistakes import UserError

BASE, STATIC, MAIN, LORA = "base", "static", "moe-bias", "lora"
SUPERVISED, LORA_SUPERVISED, LORA_HIGH_ENTROPY = "moe-bias-sft", "lora-sft", "lora-high-entropy"
_VECTOR: dict[str, Any] = {
    "experts": "free",
    "num_experts": 1,
    "top_k": 1,
    "entropy_gate": False,
    "optimizer": "sgd",
    "expert_rate": 1.0,
    "router_rate": 2e-2,
    "warm_expert_rate": 1e-1,
    "warm_epochs": 20,
}
"""A plain vector of biases, at the rates that suit it."""
LAYER_ARMS: dict[str, dict[str, Any]] = {
    "first-token": {**_VECTOR, "first_token_only": True, "rho": 1.0},
    STATIC: _VECTOR,
    "no-gate": {"entropy_gate": False},
    MAIN: {},
    "moe-bias-all-tokens": {"rho": 1.0},
    SUPERVISED: {},
}
LORA_ARMS = (LORA, LORA_HIGH_ENTROPY, LORA_SUPERVISED)
ARMS = (BASE, *LAYER_ARMS, *LORA_ARMS)
HELD_OUT, SHIFTED = "held out", "shifted"
"""Sets of problems: of the kind that is trained on, and of another."""
BEFORE = " before"
"""Ends the name of a set of problems where it was measured before the first step."""
AGAINST = (BASE, STATIC, LORA)
"""The arms that every other one is tested against, where they were run."""


@dataclass(frozen=True)
class PolicyArm:
    """One training of an arm. `right` holds, by set of problems, 1 for each that was answered right.

    The sets are `held out`, where there is one `shifted`, and each of them also `... before`, after the
    supervised phase and before the first step. `curve` has accuracy by step and set of problems. `peak_bytes` is
    the most memory the process has held (on a GPU: that was allocated), the frozen model included. `tokens` holds, as
    `right` does, how long each answer is; records of before have none.
    """

    name: str
    seed: int
    parameters: int
    sampled_tokens: int
    seconds: float
    warm_seconds: float
    updating_seconds: float
    peak_bytes: int
    right: dict[str, list[float]]
    curve: list[tuple[int, dict[str, float]]]
    tokens: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyRow:
    """An arm over its seeds: accuracy by set of problems, and by other arm the paired change of the held-out one.

    Intervals are over problems, of means over seeds. `by_seed` is held-out accuracy in the order of seeds: how far
    trainings differ is no part of the intervals. `gain` is the paired change of accuracy by the arm's steps. `tokens`
    are those of an answer, by set of problems, and `tokens_gain` their paired change by the steps.
    """

    name: str
    seeds: int
    parameters: int
    sampled_tokens: int
    seconds: float
    updating_share: float
    peak_bytes: int
    by_seed: list[float]
    accuracy: dict[str, Estimate]
    gain: dict[str, Estimate]
    change: dict[str, Estimate]
    tokens: dict[str, Estimate]
    tokens_gain: dict[str, Estimate]


def compare_policies(arms: Sequence[PolicyArm]) -> list[PolicyRow]:
    """A row per name, in order of appearance. Raises UserError where arms were measured on other problems."""
    groups = by_name(arms, lambda arm: {name: len(values) for name, values in arm.right.items()}, "problems")
    right = {name: over_seeds([arm.right for arm in group]) for name, group in groups.items()}
    return [_row(group, right) for group in groups.values()]


def chosen_arms(names: Sequence[str]) -> list[str]:
    """Those of these names in the order of `ARMS`, all of them for none. Raises UserError on a name that none has."""
    for name in names:
        if name not in ARMS:
            raise UserError(f"`arms` has {name!r}, which is none of {', '.join(ARMS)}")
    return [name for name in ARMS if not names or name in names]


def mean_curve(arms: Sequence[PolicyArm]) -> list[dict[str, float]]:
    """By step the share of the held-out problems that each arm solves after it, the mean over its seeds."""
    seen: dict[int, dict[str, list[float]]] = {}
    for arm in arms:
        for step, sets in arm.curve:
            seen.setdefault(step, {}).setdefault(arm.name, []).append(sets[HELD_OUT])
    return [
        {"step": float(step)} | {name: float(np.mean(found)) for name, found in by_arm.items()}
        for step, by_arm in sorted(seen.items())
    ]


def measured_after(sets: Iterable[str]) -> list[str]:
    """The sets of problems, without what was measured before the first step."""
    return sorted(name for name in sets if not name.endswith(BEFORE))


def percent_by_seed(by_seed: Iterable[float]) -> str:
    """Shares in whole percent, such as '42, 50, 17'."""
    return ", ".join(f"{100 * value:.0f}" for value in by_seed)


def _row(group: Sequence[PolicyArm], right: Mapping[str, Mapping[str, Floats]]) -> PolicyRow:
    """`right` has by arm and set of problems the mean over seeds of each problem."""
    first = group[0]
    own = right[first.name]
    length = over_seeds([arm.tokens for arm in group]) if all(arm.tokens for arm in group) else {}
    seconds = float(np.mean([arm.seconds for arm in group]))
    return PolicyRow(
        name=first.name,
        seeds=len(group),
        parameters=first.parameters,
        sampled_tokens=round(float(np.mean([arm.sampled_tokens for arm in group]))),
        seconds=seconds,
        updating_share=float(np.mean([arm.updating_seconds for arm in group])) / seconds if seconds else 0.0,
        peak_bytes=max(arm.peak_bytes for arm in group),
        by_seed=[float(np.mean(arm.right[HELD_OUT])) for arm in sorted(group, key=lambda arm: arm.seed)],
        accuracy={name: share(values) for name, values in own.items()},
        gain={name: mean(own[name] - own[name + BEFORE]) for name in measured_after(own) if first.name != BASE},
        change={
            other: mean(own[HELD_OUT] - right[other][HELD_OUT])
            for other in AGAINST
            if other in right and other != first.name
        },
        tokens={name: mean(values) for name, values in length.items()},
        tokens_gain={name: mean(length[name] - length[name + BEFORE]) for name in measured_after(length)},
    )
