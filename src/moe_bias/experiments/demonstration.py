"""The demonstration: from a frozen model to two measured gains on held-out problems, in minutes.

First supervised learning: one pass of the backbone over worked answers gives hidden states, and two
layers are trained on them (`static`, one expert without a gate, and MoE-Bias). Then MoE-Bias goes on
by reinforcement learning, on more problems and without their worked answers, for what time is left.
All are compared with the base on problems that none of them saw: likelihood per token, and accuracy
and length of greedy answers under one token limit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moe_bias.config import WarmConfig
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.experiments.comparison import Arm, Measured, compare
from moe_bias.experiments.grid import with_changes
from moe_bias.experiments.policy_arms import LAYER_ARMS, STATIC
from moe_bias.experiments.warm_start import prepare_warm_start, warm_layer
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.answers import greedy_answers
from moe_bias.tasks.rewards import Rewards
from moe_bias.training.loop import Watching
from moe_bias.training.problems import TaskData, collector_of, policy_of
from moe_bias.training.rl import PolicyTrainer
from moe_bias.training.sft import Prepared

MEASURING_SECONDS = 200
"""Kept free for the last step and the answers to the held-out problems, which come after the training."""


@dataclass(frozen=True)
class Sample:
    """A held-out problem with each arm's answer, and whether it was right."""

    question: str
    gold: str
    answers: list[str]
    correct: list[bool]


@dataclass(frozen=True)
class Reinforced:
    """What reinforcement learning took: steps, sampled tokens, and seconds, those of updating apart."""

    steps: int
    sampled_tokens: int
    seconds: float
    updating_seconds: float


@dataclass(frozen=True)
class DemoReport:
    """Everything the demonstration found; `expert_share` is of routed slots on held-out tokens."""

    arms: list[Arm]
    samples: list[Sample]
    expert_share: list[float]
    fork_coverage: float
    train_tokens: int
    reinforced: Reinforced
    seconds: float


def demonstrate(
    data: TaskData, settings: WarmConfig, rewards: Rewards, started: float, minutes: float
) -> tuple[DemoReport, MoEBiasLayer]:
    """Trains and measures all arms; returns what was found, and the layer after both phases.

    `started` is when the run did, of `time.perf_counter`; reinforcement learning ends early to keep the whole below
    `minutes` from then. Raises UserError where a problem has no worked answer.
    """
    prepared = prepare_warm_start(data, settings)
    plain = with_changes(settings, LAYER_ARMS[STATIC])
    layers = {
        "base": None,
        "static": warm_layer(data, prepared, plain, "training static"),
        "moe-bias": warm_layer(data, prepared, settings, "training MoE-Bias"),
    }
    trained, reinforced = _reinforced(data, layers["moe-bias"], settings, rewards, started + 60 * minutes)
    layers["moe-bias + RL"] = trained
    arms, samples = _measured(data, prepared, layers, settings)
    found = DemoReport(
        arms,
        samples,
        _used_share(trained, prepared.held_out),
        prepared.fork_coverage,
        len(prepared.train),
        reinforced,
        time.perf_counter() - started,
    )
    return found, trained


def _reinforced(
    data: TaskData, warm: MoEBiasLayer | None, settings: WarmConfig, rewards: Rewards, end: float
) -> tuple[MoEBiasLayer, Reinforced]:
    """The layer after reinforcement learning: `steps` of them, or as many as the time allows."""
    assert warm is not None
    layer = copy.deepcopy(warm)
    watching = Watching(lambda _: None, settings.steps, deadline=end - MEASURING_SECONDS)
    collector = collector_of(data, rewards, settings)
    position = PolicyTrainer(layer, data.head, collector, settings, watching).run()
    return layer, Reinforced(position.step, position.sampled_tokens, position.seconds, position.update_seconds)


def _measured(
    data: TaskData, prepared: Prepared, layers: Mapping[str, MoEBiasLayer | None], settings: WarmConfig
) -> tuple[list[Arm], list[Sample]]:
    test = data.test.problems
    answers = greedy_answers(
        data.model,
        data.head,
        data.test.prompts,
        [policy_of(layer, data.head) for layer in layers.values()],
        stop_ids=data.stop_ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        description="answering held-out problems",
    )
    texts = [[data.tokenizer.decode(answer.token_ids) for answer in column] for column in answers]
    correct = [[verdict.is_correct for verdict in data.task.verify(test, column)] for column in texts]
    measured = [
        Measured(
            name=name,
            parameters=0 if layer is None else layer.config.num_parameters(layer.hidden_size, layer.vocab_size),
            nll=per_example(token_nll(layer, prepared.held_out, data.head), prepared.held_out),
            correct=np.array(right, dtype=np.float64),
            tokens=np.array([len(answer.token_ids) for answer in column], dtype=np.float64),
            cut=np.array([not answer.finished for answer in column], dtype=np.float64),
        )
        for (name, layer), column, right in zip(layers.items(), answers, correct, strict=True)
    ]
    token_counts = per_example(torch.ones(len(prepared.held_out)), prepared.held_out)
    samples = [
        Sample(problem.question, problem.gold, list(said), list(right))
        for problem, said, right in zip(test, zip(*texts, strict=True), zip(*correct, strict=True), strict=True)
    ]
    return compare(measured, token_counts), samples


@torch.no_grad()
def _used_share(layer: MoEBiasLayer, features: Features) -> list[float]:
    """The share of routed slots that goes to each expert on these tokens."""
    routed_TE = layer.route(features.hidden.to(layer.device)).gates > 0
    return (routed_TE.sum(0) / routed_TE.sum()).tolist()
