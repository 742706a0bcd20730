"""Where the signal of reinforcement learning goes: what updates on some problems' samples do for other problems.

A layer after its supervised phase samples answers to many problems, once. Half of the problems teach it,
with the updates of `moe-bias train rl`; on the samples of the other half the change of the share of right
answers is estimated to first order, as the mean over answers of (reward - group's mean) times the sum of
(ratio - 1) over tokens. So a setting costs seconds, and many can be compared on the same samples.

    uv run python runs/rl_signal.py OUTPUT.json [--problems 200] [--seeds 3] [--task products]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_bias.commands.training_settings import CompareSettings
from moe_bias.experiments.policy_arms import LAYER_ARMS
from moe_bias.experiments.warm_start import prepare_warm_start, warm_layer
from moe_bias.features.adapted import TableMove, chunks, policy_stats
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.records import provenance, write_json
from moe_bias.support import log_prob_from_adapted
from moe_bias.training.advantage import select_high_entropy
from moe_bias.training.objectives import Sampled
from moe_bias.training.optimisation import Optimisation
from moe_bias.training.problems import TaskData, collector_of, prepare_task, rewards_of
from moe_bias.training.rl import Update

ADAMW, SGD = {"optimizer": "adamw"}, {"optimizer": "sgd"}
NO_CLIP = {"eps_low": 0.999, "eps_high": 1e6}
UPDATES: dict[str, dict[str, Any]] = {
    **{f"AdamW {rate:g}": {**ADAMW, "expert_rate": rate, "router_rate": rate} for rate in (1e-4, 3e-4, 1e-3, 3e-3)},
    "AdamW 3e-4, router still": {**ADAMW, "expert_rate": 3e-4, "router_rate": 1e-9},
    "AdamW 1e-3, router still": {**ADAMW, "expert_rate": 1e-3, "router_rate": 1e-9},
    **{
        f"SGD {expert:g}, router {router:g}": {**SGD, "expert_rate": expert, "router_rate": router}
        for expert, router in ((1e-3, 1e-3), (1e-2, 1e-3), (1e-2, 1e-2), (1e-1, 1e-2), (1.0, 2e-2))
    },
    **{
        f"AdamW {rate:g}, KL {bound:g}": {**ADAMW, "expert_rate": rate, "router_rate": rate, "step_kl": bound}
        for rate in (1e-3, 3e-3)
        for bound in (0.01, 0.03)
    },
    "AdamW 1e-3, KL 0.03, no clip": {**ADAMW, **NO_CLIP, "expert_rate": 1e-3, "router_rate": 1e-3, "step_kl": 0.03},
}
"""Rates, and bounds on the exact KL from the sampling policy; what is not named stays as it is."""
SHAPES = ((12, 4), (48, 1))
"""Problems in a step, and steps: the same problems are learned from."""
RHOS = (0.2, 1.0)


@dataclass(frozen=True)
class Samples:
    """All tokens of kept groups, by problem; `entropy` (T,) is the sampling policy's."""

    features: Features
    sampled: Sampled
    entropy: torch.Tensor
    problem: torch.Tensor

    def at(self, problems: torch.Tensor) -> Samples:
        """Of these problems alone."""
        rows = torch.isin(self.problem, problems).nonzero().squeeze(-1)
        return Samples(self.features.at(rows), self.sampled.at(rows), self.entropy[rows], self.problem[rows])


def main() -> None:
    """Samples, tries every setting, writes the record and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--problems", type=int, default=200, help="about half of them have answers of both kinds")
    parser.add_argument("--warm-problems", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="splits of the problems in two halves")
    parser.add_argument("--arms", default="moe-bias,static")
    parser.add_argument("--task", default="products")
    options = parser.parse_args()
    rows = []
    for arm in options.arms.split(","):
        settings = settings_of(options, LAYER_ARMS[arm])
        ground = prepare_task(settings, settings, seed=0)
        layer = warm_layer(ground, prepare_warm_start(ground, settings), settings, arm)
        samples, right = sampled_by(layer, ground, settings)
        for name, (prompts, steps), rho in itertools.product(UPDATES, SHAPES, RHOS):
            gains = [
                tried(layer, ground, settings, samples, {**UPDATES[name], "rho": rho}, prompts, steps, seed)
                for seed in range(options.seeds)
            ]
            own, other, kl = np.mean(gains, axis=0)
            row = {"arm": arm, "update": name, "prompts": prompts, "steps": steps, "rho": rho}
            row |= {"right": right, "own": own, "others": other, "kl": kl, "others_by_seed": [g[1] for g in gains]}
            rows.append(row)
            told = f"{arm}, {name}, {steps} x {prompts}, rho {rho}: own {own:+.3f}, others {other:+.3f}, KL {kl:.3f}"
            sys.stdout.write(f"{told}\n")
            sys.stdout.flush()
    write_json(options.output, {"options": vars(options) | {"output": ""}, "provenance": provenance(), "rows": rows})


def settings_of(options: argparse.Namespace, arm: dict[str, Any]) -> CompareSettings:
    """As `compare` has them, with all problems in one step and all tokens kept."""
    return CompareSettings(
        output=options.output,
        task=options.task,
        train_problems=options.problems,
        test_problems=20,
        warm_problems=options.warm_problems,
        prompts=options.problems,
        group=4,
        max_new_tokens=48,
        **{**arm, "rho": 1.0},
    )


def sampled_by(layer: MoEBiasLayer, ground: TaskData, settings: CompareSettings) -> tuple[Samples, float]:
    """Answers to all problems, and the share of right ones."""
    collected = collector_of(ground, rewards_of(settings), settings).collect(layer, 0)
    assert collected.batch is not None
    assert collected.sampled is not None
    entropy_T = policy_stats(
        layer, collected.batch, columns_of(layer, ground, collected.batch), ground.head.transform
    ).entropy
    problem_T = collected.batch.example // settings.group
    return Samples(collected.batch, collected.sampled, entropy_T, problem_T), float(np.mean(collected.rewards))


def columns_of(layer: MoEBiasLayer, ground: TaskData, batch: Features) -> Any:
    """Base logits on the support of the batch's given rows."""
    logits_TM = ground.head.columns(layer.support)(batch.hidden)
    return lambda rows: logits_TM[rows]


def tried(
    layer: MoEBiasLayer,
    ground: TaskData,
    settings: CompareSettings,
    samples: Samples,
    changes: dict[str, Any],
    prompts: int,
    steps: int,
    seed: int,
) -> tuple[float, float, float]:
    """Estimated gain on the problems learned from and on the others, and KL to the sampling policy."""
    settings = settings.model_copy(update=changes)
    problems = samples.problem.unique()
    order = problems[torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed))]
    own, others = order[: prompts * steps], order[len(order) // 2 :]
    assert prompts * steps <= len(order) // 2
    trained = copy.deepcopy(layer)
    update = Update(trained, ground.head, settings, Optimisation(trained, settings, steps))
    for step in range(steps):
        part = samples.at(own[step * prompts : (step + 1) * prompts])
        chosen_T, _ = select_high_entropy(part.entropy, settings.rho)
        update.learn(part.features.at(chosen_T), part.sampled.at(chosen_T), step)
    (own_gain, _), (other_gain, moved) = (gain(trained, ground, samples.at(some)) for some in (own, others))
    return own_gain, other_gain, moved


@torch.no_grad()
def gain(layer: MoEBiasLayer, ground: TaskData, samples: Samples) -> tuple[float, float]:
    """First-order change of the share of right answers, and mean of ratio - 1 - log ratio, an estimate of KL."""
    logits, log_probs = columns_of(layer, ground, samples.features), []
    coefficients_TC = layer.mix(samples.features.hidden, samples.features.entropy).coefficients
    move = TableMove(layer, layer.table(), ground.head.transform)
    for rows in chunks(len(samples.features), move.table_CM):
        batch = samples.features.at(rows)
        adapted_TM = move.adapted(coefficients_TC[rows], logits(rows))
        log_probs.append(log_prob_from_adapted(batch.logit, batch.column, adapted_TM, batch.rest))
    log_ratio_T = (torch.cat(log_probs) - samples.sampled.log_prob).double()
    ratio_T = log_ratio_T.exp()
    answers = int(samples.features.example.unique().numel())
    # Advantages are in units of the group's standard deviation; half is that of even odds.
    gained = (samples.sampled.advantage * (ratio_T - 1)).sum() / answers / 2
    return float(gained), float((ratio_T - 1 - log_ratio_T).mean())


if __name__ == "__main__":
    main()
