"""The demonstration: from a frozen model to a measured gain on held-out problems, in minutes.

One pass of the backbone over worked answers gives hidden states. Two layers are trained on them
(`static`, one expert without a gate, and MoE-Bias) and compared with the base on problems that
neither saw: likelihood per token, and accuracy and length of greedy answers under one token limit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_bias.adapter import save_layer
from moe_bias.backbone import Head, find_head, load_model
from moe_bias.commands.demo_report import DemoReport, Sample, announce, print_report, report_console
from moe_bias.commands.policy import policy_of
from moe_bias.config import DemoSettings, LayerConfig
from moe_bias.evaluation.comparison import Arm, Measured, compare
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.records import provenance, write_json
from moe_bias.rollout.greedy import greedy_answers
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.conversations import Example, ask, encode, encode_prompt, end_of_turn, ends
from moe_bias.tasks.task import Problem, Task
from moe_bias.training.sft import Prepared, fit, prepare

MAX_LENGTH = 1024
"""Longer worked answers are cut here, in tokens with the prompt."""


@dataclass(frozen=True)
class Frozen:
    """The frozen model with its tokenizer and output embedding, and the token that ends an answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    stop_ids: list[int]


def run(settings: DemoSettings) -> None:
    """Runs the whole demonstration and prints it; saves the adapter and a record in `settings.output`."""
    started = time.perf_counter()
    console = report_console()
    task = make_task(settings.task, settings.task_options, small=True)
    problems = task.problems(settings.train_problems + settings.test_problems, settings.seed)
    train, test = problems[: settings.train_problems], problems[settings.train_problems :]
    frozen = _load(settings)
    announce(console, settings, frozen.head, frozen.model.num_parameters())
    prepared = prepare(
        frozen.model,
        frozen.head,
        _examples(train, frozen.tokenizer),
        _examples(test, frozen.tokenizer),
        settings,
        always=ends(frozen.tokenizer),
        batch_size=settings.batch_size,
    )
    static = _trained(frozen, prepared, settings, LayerConfig(num_experts=1, top_k=1, entropy_gate=False))
    moe_bias = _trained(frozen, prepared, settings, settings.layer_config())
    arms, samples = _measure(
        frozen, prepared, {"base": None, "static": static, "moe-bias": moe_bias}, task, test, settings
    )
    save_layer(moe_bias, settings.output, frozen.model, prepared.fork_coverage)
    report = DemoReport(
        arms,
        samples,
        _used_share(moe_bias, prepared.held_out),
        prepared.fork_coverage,
        len(prepared.train),
        time.perf_counter() - started,
    )
    write_json(
        settings.output / "record.json",
        {"settings": settings.model_dump(mode="json"), "provenance": provenance(), **asdict(report)},
    )
    print_report(console, report, moe_bias, frozen.tokenizer, settings)


def _load(settings: DemoSettings) -> Frozen:
    model, tokenizer = load_model(settings)
    return Frozen(model, tokenizer, find_head(model)[1], end_of_turn(ask(""), tokenizer))


def _examples(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    encoded = [encode(ask(problem.question, problem.worked), tokenizer, MAX_LENGTH) for problem in problems]
    return [example for example in encoded if example is not None]


def _trained(frozen: Frozen, prepared: Prepared, settings: DemoSettings, config: LayerConfig) -> MoEBiasLayer:
    torch.manual_seed(settings.seed)
    config = config.model_copy(update={"support": prepared.support})
    layer = MoEBiasLayer(config, frozen.head.hidden_size, frozen.head.vocab_size).to(frozen.head.device)
    fit(
        layer,
        prepared.train,
        frozen.head,
        settings,
        "training static" if config.num_experts == 1 else "training MoE-Bias",
    )
    return layer


def _measure(
    frozen: Frozen,
    prepared: Prepared,
    layers: Mapping[str, MoEBiasLayer | None],
    task: Task,
    test: Sequence[Problem],
    settings: DemoSettings,
) -> tuple[list[Arm], list[Sample]]:
    answers = greedy_answers(
        frozen.model,
        frozen.head,
        [encode_prompt(ask(problem.question), frozen.tokenizer) for problem in test],
        [policy_of(layer, frozen.head) for layer in layers.values()],
        stop_ids=frozen.stop_ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        description="answering held-out problems",
    )
    texts = [[frozen.tokenizer.decode(answer.token_ids) for answer in column] for column in answers]
    correct = [[verdict.is_correct for verdict in task.verify(test, column)] for column in texts]
    measured = [
        Measured(
            name=name,
            parameters=0 if layer is None else layer.config.num_parameters(layer.hidden_size, layer.vocab_size),
            nll=per_example(token_nll(layer, prepared.held_out, frozen.head), prepared.held_out),
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
    routed_TE = layer.route(features.hidden.to(layer.experts.device)).gates > 0
    return (routed_TE.sum(0) / routed_TE.sum()).tolist()
