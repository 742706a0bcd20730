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
from dataclasses import asdict

import numpy as np
import torch

from moe_bias.adapter import save_layer
from moe_bias.commands.demo_report import DemoReport, Reinforced, Sample, announce, print_report, report_console
from moe_bias.commands.training_settings import DemoSettings
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.experiments.comparison import Arm, Measured, compare
from moe_bias.experiments.grid import with_changes
from moe_bias.experiments.policy_arms import LAYER_ARMS, STATIC
from moe_bias.experiments.warm_start import prepare_warm_start, warm_layer
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.rollout.answers import greedy_answers
from moe_bias.training.loop import Watching
from moe_bias.training.problems import TaskData, collector_of, policy_of, prepare_task, rewards_of
from moe_bias.training.rl import PolicyTrainer
from moe_bias.training.sft import Prepared, refuse_impossible

MEASURING_SECONDS = 200
"""Kept free for the last step and the answers to the held-out problems, which come after the training."""


def run(settings: DemoSettings) -> None:
    """Runs the whole demonstration and prints it; saves the adapter and a record in `settings.output`.

    Raises UserError where the task is none, or has no worked answers.
    """
    started = time.perf_counter()
    console = report_console()
    rewards_of(settings).check_limit(settings.max_new_tokens)
    ground = prepare_task(settings, settings, settings.seed)
    refuse_impossible(settings, ground.head)
    announce(console, settings, ground.head, ground.model.num_parameters())
    prepared = prepare_warm_start(ground, settings)
    plain = with_changes(settings, LAYER_ARMS[STATIC])
    layers = {
        "base": None,
        "static": warm_layer(ground, prepared, plain, "training static"),
        "moe-bias": warm_layer(ground, prepared, settings, "training MoE-Bias"),
    }
    trained, reinforced = _reinforced(ground, layers["moe-bias"], settings, started)
    layers["moe-bias + RL"] = trained
    arms, samples = _measure(ground, prepared, layers, settings)
    save_layer(trained, settings.output, ground.model, prepared.fork_coverage)
    report = DemoReport(
        arms,
        samples,
        _used_share(trained, prepared.held_out),
        prepared.fork_coverage,
        len(prepared.train),
        reinforced,
        time.perf_counter() - started,
    )
    write_json(
        settings.output / "record.json",
        {
            "kind": RecordKind.DEMO,
            "settings": settings.model_dump(mode="json"),
            "provenance": provenance(),
            **asdict(report),
        },
    )
    print_report(console, report, trained, ground.tokenizer, settings)


def _reinforced(
    ground: TaskData, warm: MoEBiasLayer | None, settings: DemoSettings, started: float
) -> tuple[MoEBiasLayer, Reinforced]:
    """The layer after reinforcement learning: `steps` of them, or as many as the time allows."""
    assert warm is not None
    layer = copy.deepcopy(warm)
    deadline = started + 60 * settings.minutes - MEASURING_SECONDS
    watching = Watching(lambda _: None, settings.steps, deadline=deadline)
    collector = collector_of(ground, rewards_of(settings), settings)
    position = PolicyTrainer(layer, ground.head, collector, settings, watching).run()
    return layer, Reinforced(position.step, position.sampled_tokens, position.seconds, position.update_seconds)


def _measure(
    ground: TaskData, prepared: Prepared, layers: Mapping[str, MoEBiasLayer | None], settings: DemoSettings
) -> tuple[list[Arm], list[Sample]]:
    test = ground.test.problems
    answers = greedy_answers(
        ground.model,
        ground.head,
        ground.test.prompts,
        [policy_of(layer, ground.head) for layer in layers.values()],
        stop_ids=ground.stop_ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        description="answering held-out problems",
    )
    texts = [[ground.tokenizer.decode(answer.token_ids) for answer in column] for column in answers]
    correct = [[verdict.is_correct for verdict in ground.task.verify(test, column)] for column in texts]
    measured = [
        Measured(
            name=name,
            parameters=0 if layer is None else layer.config.num_parameters(layer.hidden_size, layer.vocab_size),
            nll=per_example(token_nll(layer, prepared.held_out, ground.head), prepared.held_out),
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
