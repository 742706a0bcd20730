"""What trains and measures an arm by rewards: supervised phase, training, and greedy answers by step."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from moe_bias.adapter import save_layer
from moe_bias.config import CompareConfig
from moe_bias.experiments.arm import arm_name
from moe_bias.experiments.grid import with_changes
from moe_bias.experiments.grpo_lora import train_grpo_lora
from moe_bias.experiments.grpo_trainer import GRPOChoices, check_trl
from moe_bias.experiments.lora import Budget, LoRAChoices, lora_on, train_lora
from moe_bias.experiments.policy_arms import (
    BASE,
    BEFORE,
    HELD_OUT,
    LAYER_ARMS,
    LORA,
    LORA_ARMS,
    LORA_HIGH_ENTROPY,
    LORA_SUPERVISED,
    SHIFTED,
    SUPERVISED,
    PolicyArm,
)
from moe_bias.experiments.policy_budgets import evaluated_steps, refuse_large_steps
from moe_bias.experiments.warm_start import prepare_warm_start, warm_layer, warm_settings, worked_examples
from moe_bias.features.extract import Features, run_backbone, with_scalars
from moe_bias.features.source import Subset
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.records import peak_bytes, whole_folder
from moe_bias.rollout.policy import Policy
from moe_bias.tasks.conversations import ask, encode_prompt
from moe_bias.tasks.rewards import Rewards
from moe_bias.tasks.task import Problem, Task
from moe_bias.training.collect import Curriculum
from moe_bias.training.loop import Watching
from moe_bias.training.problems import (
    GradedAnswer,
    TaskData,
    advantage_of,
    collector_of,
    fresh_policy_layer,
    graded_answers,
    policy_of,
)
from moe_bias.training.rl import PolicyTrainer
from moe_bias.training.sft import Prepared, refuse_impossible
from moe_bias.training.trainer import Trainer

Shifted = tuple[Task, Sequence[Problem]]
"""A task that nothing is trained on, and its problems to measure on."""


def refuse_unfit_lora(names: Sequence[str], config: CompareConfig) -> None:
    """Raises UserError where LoRA could not be trained, before anything is loaded."""
    if {LORA, LORA_HIGH_ENTROPY} & set(names):
        check_trl()
        refuse_uneven_lora(names, config)


def refuse_uneven_lora(names: Sequence[str], config: CompareConfig) -> None:
    """Raises UserError where a step of LoRA's by rewards does not divide into micro-batches."""
    if {LORA, LORA_HIGH_ENTROPY} & set(names):
        _grpo_choices(LORA, config)


def prepare_stage(
    ground: TaskData,
    shifted: Shifted | None,
    rewards: Rewards,
    config: CompareConfig,
    names: Sequence[str],
    adapters: Path,
) -> Stage:
    """The frozen model and all problems, which are the same for all seeds; arms leave their adapters in `adapters`.

    Raises UserError where an arm of these names could not be run to its end.
    """
    refuse_impossible(config, ground.head)
    refuse_unfit_problems(ground.task, ground.train.problems, config, names)
    refuse_large_steps(ground, config, names)
    rewards.try_on(ground.train.problems[0])
    tests = {HELD_OUT: (ground.task, ground.test)}
    if shifted is not None:
        task, problems = shifted
        prompts = [encode_prompt(ask(problem.question), ground.tokenizer) for problem in problems]
        tests[SHIFTED] = (task, Curriculum(list(problems), prompts))
    return Stage(ground, tests, rewards, with_changes(config, {"seed": 0}), adapters)


@dataclass(frozen=True)
class Stage:
    """What all arms run on. `tests` are tasks and held-out problems by the name of the set.

    What the frozen model says of the worked answers is computed once, for all arms and seeds.
    """

    ground: TaskData
    tests: dict[str, tuple[Task, Curriculum]]
    rewards: Rewards
    settings: CompareConfig
    adapters: Path
    lora_starts: dict[int, _LoRAStart] = field(default_factory=dict)

    @cached_property
    def _prepared(self) -> Prepared:
        return prepare_warm_start(self.ground, self.settings)

    @cached_property
    def _worked(self) -> Features:
        """Of all problems to train on, on the support of the supervised phase; examples in their order."""
        examples = worked_examples(self.ground, self.ground.train.problems)
        if len(examples) < len(self.ground.train.problems):
            raise UserError("a worked answer has no place beside its prompt; take shorter problems")
        hidden = run_backbone(self.ground.model, examples, self.settings.batch_size, "worked answers")
        support = self._prepared.train.support.tolist()
        return with_scalars(self.ground.head, hidden, support, "their base distribution")

    def run(self, name: str, settings: CompareConfig) -> PolicyArm:
        """One arm with the settings' seed."""
        if name == BASE:
            points = [(0, self._answers([policy_of(None, self.ground.head)], settings)[0])]
            return self._measured(BASE, 0, 0, 0.0, (0, 0.0, 0.0), points)
        if name in LORA_ARMS:
            return self._lora(name, settings)
        return self._layer(name, with_changes(settings, LAYER_ARMS[name]))

    def _layer(self, name: str, settings: CompareConfig) -> PolicyArm:
        shared_seconds = self._prepared.seconds if settings.warm_problems else 0.0
        started = time.perf_counter()
        layer = self._beginning(settings)
        warm_seconds = shared_seconds + time.perf_counter() - started
        copies = _Copies()
        if name == SUPERVISED:
            copies.take(layer)
            started = time.perf_counter()
            self._supervise(layer, settings, copies)
            seconds = time.perf_counter() - started
            spent = 0, seconds, seconds
        else:
            collector = collector_of(self.ground, self.rewards, settings)
            watching = Watching(copies.take, settings.evaluate_every)
            position = PolicyTrainer(layer, self.ground.head, collector, settings, watching).run()
            spent = position.sampled_tokens, position.seconds, position.update_seconds
        if not settings.first_token_only:  # an adapter acts on every token
            save_layer(layer, self._adapter(name, settings), self.ground.model)
        answers = self._answers([policy_of(layer, self.ground.head) for layer in copies.layers], settings)
        points = list(zip(evaluated_steps(settings), answers, strict=True))
        parameters = layer.config.num_parameters(layer.hidden_size, layer.vocab_size)
        return self._measured(name, settings.seed, parameters, warm_seconds, spent, points)

    def _measured(
        self, name: str, seed: int, parameters: int, warm_seconds: float, spent: _Spent, points: Sequence[_Point]
    ) -> PolicyArm:
        sampled_tokens, seconds, updating_seconds = spent
        return PolicyArm(
            name=name,
            seed=seed,
            parameters=parameters,
            sampled_tokens=sampled_tokens,
            seconds=seconds,
            warm_seconds=warm_seconds,
            updating_seconds=updating_seconds,
            peak_bytes=peak_bytes(self.ground.head.device),
            right=_right(points),
            curve=_curve(points) if len(points) > 1 else [],
            tokens=_tokens(points),
        )

    def _beginning(self, settings: CompareConfig) -> MoEBiasLayer:
        """A layer after its supervised phase: on first tokens alone for the arm that acts on them."""
        if not settings.warm_problems:
            return fresh_policy_layer(self.ground, settings).layer
        prepared = self._prepared
        if settings.first_token_only:
            assert isinstance(prepared.train, Features)
            first = (prepared.train.position == 0).nonzero().squeeze(-1)
            prepared = replace(prepared, train=Subset(prepared.train, first))
        return warm_layer(self.ground, prepared, settings, "learning the form")

    def _supervise(self, layer: MoEBiasLayer, settings: CompareConfig, copies: _Copies) -> None:
        """Goes on with worked answers: in a step those of the problems that RL samples answers to, as many passes."""
        training = warm_settings(settings).model_copy(update={"epochs": settings.epochs, "warmup": 0.0})
        for problems in self._parts(settings):
            rows = torch.isin(self._worked.example, torch.tensor(problems)).nonzero().squeeze(-1)
            Trainer(layer, Subset(self._worked, rows), self.ground.head, training).run("supervised")
            copies.take(layer)

    def _parts(self, settings: CompareConfig) -> list[list[int]]:
        """Numbers of the problems of all steps between one evaluation and the next."""
        collector, steps = collector_of(self.ground, self.rewards, settings), evaluated_steps(settings)
        return [
            sorted({number for step in range(*part) for number in collector.order(step)[: settings.prompts]})
            for part in pairwise(steps)
        ]

    def _lora(self, name: str, settings: CompareConfig) -> PolicyArm:
        with lora_on(self.ground.model, settings.lora_rank, settings.seed) as adapted:
            # LoRA leaves the output embedding alone, so the head is the same.
            on_lora = replace(self, ground=replace(self.ground, answering=adapted))
            start = self._lora_start(adapted, on_lora, settings)
            points = [(0, start.answers)]

            def measure(step: int) -> None:
                if step in evaluated_steps(settings):
                    points.append((step, on_lora._answers([policy_of(None, self.ground.head)], settings)[0]))

            train = self._lora_supervised if name == LORA_SUPERVISED else self._lora_rewarded
            parameters, spent = train(name, adapted, settings, measure)
            folder = self._adapter(name, settings)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its record
            with whole_folder(folder) as beside:
                adapted.save_pretrained(beside)
        return self._measured(name, settings.seed, parameters, start.seconds, spent, points)

    def _adapter(self, name: str, settings: CompareConfig) -> Path:
        return self.adapters / arm_name(name, settings.seed)

    def _lora_start(self, adapted: Any, on_lora: Stage, settings: CompareConfig) -> _LoRAStart:
        """Brings fresh LoRA weights through the supervised phase, or to where it led the last arm of this seed."""
        if settings.seed not in self.lora_starts:
            started = time.perf_counter()
            if settings.warm_problems:
                warm = list(range(settings.warm_problems))
                self._supervise_lora(adapted, warm, settings.lora_warm_epochs, settings)
            seconds = time.perf_counter() - started
            weights = {key: value.clone() for key, value in get_peft_model_state_dict(adapted).items()}
            answers = on_lora._answers([policy_of(None, self.ground.head)], settings)[0]
            self.lora_starts[settings.seed] = _LoRAStart(weights, answers, seconds)
        start = self.lora_starts[settings.seed]
        set_peft_model_state_dict(adapted, start.weights)
        return start

    def _supervise_lora(self, adapted: Any, problems: Sequence[int], passes: int, settings: CompareConfig) -> int:
        """Passes over worked answers; returns the count of trained parameters."""
        examples = worked_examples(self.ground, [self.ground.train.problems[number] for number in problems])
        budget = Budget(passes * sum(len(example.completion_ids) for example in examples), "tokens")
        choices = LoRAChoices(settings.lora_rank, settings.lora_warm_rate, settings.lora_batch_size)
        return train_lora(adapted, examples, choices, budget, settings.seed, "worked answers").parameters

    def _lora_supervised(
        self, _: str, adapted: Any, settings: CompareConfig, measure: Callable[[int], None]
    ) -> tuple[int, _Spent]:
        seconds, parameters = 0.0, 0
        for step, problems in zip(evaluated_steps(settings)[1:], self._parts(settings), strict=True):
            started = time.perf_counter()
            parameters = self._supervise_lora(adapted, problems, settings.lora_warm_epochs, settings)
            seconds += time.perf_counter() - started
            measure(step)
        return parameters, (0, seconds, seconds)

    def _lora_rewarded(
        self, name: str, adapted: Any, settings: CompareConfig, measure: Callable[[int], None]
    ) -> tuple[int, _Spent]:
        ground, rewards = self.ground, self.rewards
        prompts = [[{"role": "user", "content": problem.question}] for problem in ground.train.problems]
        gold = {problem.question: problem for problem in ground.train.problems}

        def reward(turns: list[Any], completions: list[str], lengths: list[int]) -> list[float]:
            problems = [gold[turn[0]["content"]] for turn in turns]
            verdicts = ground.task.verify(problems, completions)
            return rewards.shaped(problems, completions, verdicts, lengths, settings.max_new_tokens)

        choices = _grpo_choices(name, settings)
        shaped = advantage_of(rewards) if rewards.rules.length_penalty else None
        report = train_grpo_lora(adapted, ground.tokenizer, prompts, reward, choices, name, measure, shaped)
        return report.parameters, (report.sampled_tokens, report.seconds, report.updating_seconds)

    def _answers(self, policies: Sequence[Policy], settings: CompareConfig) -> list[_Answers]:
        """By policy and set of problems the greedy answers. All policies share one pass of the model."""
        found: list[_Answers] = [{} for _ in policies]
        for name, (task, curriculum) in self.tests.items():
            ground = replace(self.ground, task=task)
            columns = graded_answers(ground, curriculum, policies, settings, f"{name} problems")
            for answers, column in zip(found, columns, strict=True):
                answers[name] = column
        return found


def refuse_unfit_problems(task: Task, train: Sequence[Problem], settings: CompareConfig, names: Sequence[str]) -> None:
    """Raises UserError where a problem lacks the worked answer that a supervised phase or arm would learn from."""
    supervised = [name for name in (SUPERVISED, LORA_SUPERVISED) if name in names]
    needed = train if supervised else train[: settings.warm_problems]
    if not all(problem.worked for problem in needed):
        others = ",".join(name for name in names if name not in supervised)
        raise UserError(
            f"{task.name} has problems without worked answers: set `warm_problems` 0"
            + (f" and leave out {' and '.join(supervised)} with `arms` {others}" if supervised else "")
        )
    if SUPERVISED in names and not settings.warm_problems:
        raise UserError(f"{SUPERVISED} goes on from a supervised phase: leave it out, or set `warm_problems` above 0")


def _grpo_choices(name: str, settings: CompareConfig) -> GRPOChoices:
    return GRPOChoices(
        settings.steps,
        settings.prompts,
        settings.group,
        settings.max_new_tokens,
        settings.temperature,
        1.0 if name == LORA else settings.rho,
        settings.lora_rate,
        settings.lora_batch_size,
        settings.seed,
    )


_Answers = dict[str, list[GradedAnswer]]
"""Greedy answers by set of problems."""
_Spent = tuple[int, float, float]
"""Sampled tokens, the seconds of training, and those of updating among them."""
_Point = tuple[int, _Answers]
"""A step, and the answers after it."""


@dataclass(frozen=True)
class _LoRAStart:
    """LoRA weights after the supervised phase, their greedy answers, and the seconds it took."""

    weights: dict[str, Tensor]
    answers: _Answers
    seconds: float


@dataclass(frozen=True)
class _Copies:
    """Copies of a layer on its way, which are then measured together."""

    layers: list[MoEBiasLayer] = field(default_factory=list)

    def take(self, layer: MoEBiasLayer) -> None:
        """Adds one."""
        self.layers.append(copy.deepcopy(layer))


def _right(points: Sequence[_Point]) -> dict[str, list[float]]:
    """Which answers are right, before the first step and after the last."""
    sets = {name + BEFORE: answers for name, answers in points[0][1].items()} | points[-1][1]
    return {name: [float(answer.verdict.is_correct) for answer in answers] for name, answers in sets.items()}


def _tokens(points: Sequence[_Point]) -> dict[str, list[float]]:
    """How long they are."""
    sets = {name + BEFORE: answers for name, answers in points[0][1].items()} | points[-1][1]
    return {name: [float(answer.tokens) for answer in answers] for name, answers in sets.items()}


def _curve(points: Sequence[_Point]) -> list[tuple[int, dict[str, float]]]:
    return [
        (step, {name: float(np.mean([one.verdict.is_correct for one in answers])) for name, answers in sets.items()})
        for step, sets in points
    ]
