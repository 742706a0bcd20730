"""`moe-bias compare`: the arms of reinforcement learning on one task, each run once per seed, and the table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from moe_bias.commands.demo_report import report_console
from moe_bias.commands.policy import (
    Ground,
    collector_of,
    fresh_policy_layer,
    greedy_verdicts,
    policy_of,
    prepare_ground,
    rewards_of,
    task_of,
)
from moe_bias.commands.policy_table import print_policies
from moe_bias.config import CompareSettings, Interrupted, TrainingSettings, UserError
from moe_bias.evaluation.grid import with_changes
from moe_bias.evaluation.policy_arms import (
    ARMS,
    BASE,
    LAYER_ARMS,
    LORA_ARMS,
    PolicyArm,
    PolicyRecords,
    compare_policies,
)
from moe_bias.features.extract import Features, run_backbone, with_scalars
from moe_bias.features.source import FeatureSource, Subset
from moe_bias.layer import MoEBiasLayer
from moe_bias.records import peak_bytes, write_json
from moe_bias.tasks.conversations import Example, ask, encode, encode_prompt
from moe_bias.tasks.task import Task
from moe_bias.training.collect import Curriculum
from moe_bias.training.grpo_lora import train_grpo_lora
from moe_bias.training.grpo_trainer import GRPOChoices
from moe_bias.training.lora import Budget, LoRAChoices, lora_on, train_lora
from moe_bias.training.rl import PolicyTrainer, Watching
from moe_bias.training.run_folder import begin, refuse_other_settings
from moe_bias.training.sft import fit

TABLE_FILE = "table.json"
MAX_LENGTH = 1024
"""Longer worked answers are cut here, in tokens with the prompt."""


def run(settings: CompareSettings) -> None:
    """Runs the arms that have no record yet, and prints all of them.

    Raises UserError on arms that there are not, settings that cannot be used, and where the folder holds
    arms of other settings; Interrupted on Ctrl-C, saying how many are done.
    """
    names = _names(settings)
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    rewards_of(settings)
    console, records = report_console(), PolicyRecords(settings.output)
    wanted = [(name, seed) for name in names for seed in ([0] if name == BASE else settings.seeds)]
    try:
        if any(records.load(*each) is None for each in wanted):
            begin(settings.output, settings.model_dump(mode="json"), {})
            stage = _stage(settings)
            for name, seed in wanted:
                if records.load(name, seed) is None:
                    console.print(f"\n[bold]{name}, seed {seed}[/bold]")
                    arm = stage.run(name, with_changes(settings, {"seed": seed}))
                    records.save(arm, settings.model_dump(mode="json"))
    except KeyboardInterrupt as interrupt:
        count = sum(records.load(*each) is not None for each in wanted)
        raise Interrupted(
            f"{count} of {len(wanted)} are done and kept in {records.folder}; run the same command again for the others"
        ) from interrupt
    _report(console, settings, [done for each in wanted if (done := records.load(*each)) is not None])


def _names(settings: CompareSettings) -> list[str]:
    for name in settings.arms:
        if name not in ARMS:
            raise UserError(f"--arms has {name!r}, which is none of {', '.join(ARMS)}")
    return [name for name in ARMS if not settings.arms or name in settings.arms]


def _report(console: Console, settings: CompareSettings, arms: Sequence[PolicyArm]) -> None:
    rows = compare_policies(arms)
    write_json(settings.output / TABLE_FILE, {"rows": [asdict(row) for row in rows]})
    print_policies(console, rows)
    console.print(f"Records and {TABLE_FILE} are in {settings.output}.")


def _stage(settings: CompareSettings) -> Stage:
    """The frozen model and all problems, which are the same for all seeds."""
    ground = prepare_ground(settings, settings, seed=0)
    tests = {"held out": (ground.task, ground.test)}
    if settings.shifted_task or settings.shifted_options:
        options = {**settings.task_options, **settings.shifted_options}
        name = settings.shifted_task or settings.task
        shifted = task_of(settings.model_copy(update={"task": name, "task_options": options, "problems": ""}))
        problems = shifted.problems(settings.test_problems, seed=1)
        prompts = [encode_prompt(ask(problem.question), ground.tokenizer) for problem in problems]
        tests["shifted"] = (shifted, Curriculum(problems, prompts))
    return Stage(ground, tests)


@dataclass(frozen=True)
class Stage:
    """What all arms run on. `tests` are tasks and held-out problems by the name of the set."""

    ground: Ground
    tests: dict[str, tuple[Task, Curriculum]]

    def run(self, name: str, settings: CompareSettings) -> PolicyArm:
        """One arm with the settings' seed."""
        if name == BASE:
            right = self._right(None, settings)
            both = right | {f"{key} before": values for key, values in right.items()}
            return PolicyArm(BASE, 0, 0, 0, 0.0, 0.0, 0.0, peak_bytes(self.ground.head.device), both, [])
        if name in LORA_ARMS:
            return self._lora(name, settings)
        return self._layer(name, with_changes(settings, LAYER_ARMS[name]))

    def _layer(self, name: str, settings: CompareSettings) -> PolicyArm:
        started = time.perf_counter()
        layer = fresh_policy_layer(self.ground, settings).layer
        if settings.warm_problems:
            self._warm_layer(layer, settings)
        warm_seconds = time.perf_counter() - started
        right = self._before(layer, settings)
        curve = _Curve()
        collector = collector_of(self.ground, rewards_of(settings), settings)

        def evaluate(layer: MoEBiasLayer) -> float:
            return float(np.mean(self._right(layer, settings, ["held out"])["held out"]))

        watching = Watching(evaluate, settings.evaluate_every, log=curve)
        position = PolicyTrainer(layer, self.ground.head, collector, settings, watching).run()
        return PolicyArm(
            name,
            settings.seed,
            layer.config.num_parameters(layer.hidden_size, layer.vocab_size),
            position.sampled_tokens,
            position.seconds,
            warm_seconds,
            position.update_seconds,
            peak_bytes(self.ground.head.device),
            right | self._right(layer, settings),
            curve.points,
        )

    def _warm_layer(self, layer: MoEBiasLayer, settings: CompareSettings) -> None:
        """Supervised learning of the worked answers, on the first tokens alone for the arm that acts on them."""
        support = None if layer.support is None else layer.support.tolist()
        features: FeatureSource = self._warm_features(settings, support)
        if settings.first_token_only:
            assert isinstance(features, Features)
            features = Subset(features, (features.position == 0).nonzero().squeeze(-1))
        training = TrainingSettings(
            **layer.config.model_dump(include={"num_experts", "top_k", "entropy_gate", "load_balance_weight"}),
            normalisation=settings.normalisation,
            gate_alpha=settings.gate_alpha,
            gate_beta=settings.gate_beta,
            seed=settings.seed,
            epochs=settings.warm_epochs,
            expert_rate=settings.warm_expert_rate,
            router_rate=settings.warm_router_rate,
        )
        fit(layer, features, self.ground.head, training, "learning the form")

    def _warm_features(self, settings: CompareSettings, support: list[int] | None) -> Features:
        ids = list(range(self.ground.head.vocab_size)) if support is None else support
        hidden = run_backbone(self.ground.model, self._worked(settings), settings.batch_size, "worked answers")
        return with_scalars(self.ground.head, hidden, ids, "their base distribution")

    def _worked(self, settings: CompareSettings) -> list[Example]:
        problems = self.ground.train.problems[: settings.warm_problems]
        if not all(problem.worked for problem in problems):
            raise UserError(f"{self.ground.task.name} has problems without worked answers; set --warm-problems 0")
        encoded = [encode(ask(p.question, p.worked), self.ground.tokenizer, MAX_LENGTH) for p in problems]
        return [example for example in encoded if example is not None]

    def _lora(self, name: str, settings: CompareSettings) -> PolicyArm:
        ground, started = self.ground, time.perf_counter()
        prompts = [[{"role": "user", "content": problem.question}] for problem in ground.train.problems]
        gold, rewards = {problem.question: problem for problem in ground.train.problems}, rewards_of(settings)

        def reward(turns: list[Any], completions: list[str]) -> list[float]:
            problems = [gold[turn[0]["content"]] for turn in turns]
            lengths = [len(ids) for ids in ground.tokenizer(completions, add_special_tokens=False).input_ids]
            verdicts = ground.task.verify(problems, completions)
            return rewards.shaped(problems, completions, verdicts, lengths, settings.max_new_tokens)

        with lora_on(ground.model, settings.lora_rank, settings.seed) as adapted:
            if settings.warm_problems:
                examples = self._worked(settings)
                budget = Budget(settings.warm_epochs * sum(len(e.completion_ids) for e in examples), "tokens")
                choices = LoRAChoices(settings.lora_rank, settings.lora_warm_rate, settings.lora_batch_size)
                train_lora(adapted, examples, choices, budget, settings.seed, "learning the form")
            warm_seconds = time.perf_counter() - started
            on_lora = replace(self, ground=replace(ground, model=adapted))  # LoRA leaves the output embedding alone
            right = on_lora._before(None, settings)
            grpo = GRPOChoices(
                settings.steps,
                settings.prompts,
                settings.group,
                settings.max_new_tokens,
                settings.temperature,
                1.0 if name == LORA_ARMS[0] else settings.rho,
                settings.lora_rate,
                settings.lora_batch_size,
                settings.seed,
            )
            report = train_grpo_lora(adapted, ground.tokenizer, prompts, reward, grpo, name)
            after = on_lora._right(None, settings)
        accuracy = float(np.mean(after["held out"]))
        return PolicyArm(
            name,
            settings.seed,
            report.parameters,
            report.sampled_tokens,
            report.seconds,
            warm_seconds,
            report.updating_seconds,
            report.peak_bytes,
            right | after,
            [(0, float(np.mean(right["held out before"]))), (settings.steps, accuracy)],
        )

    def _before(self, layer: MoEBiasLayer | None, settings: CompareSettings) -> dict[str, list[float]]:
        return {f"{name} before": values for name, values in self._right(layer, settings).items()}

    def _right(
        self, layer: MoEBiasLayer | None, settings: CompareSettings, sets: Sequence[str] | None = None
    ) -> dict[str, list[float]]:
        """By set of problems, which greedy answers are right."""
        policy = policy_of(layer, self.ground.head)
        found = {}
        for name in self.tests if sets is None else sets:
            task, curriculum = self.tests[name]
            ground = replace(self.ground, task=task)
            verdicts = greedy_verdicts(ground, curriculum, [policy], settings, f"{name} problems")[0]
            found[name] = [float(verdict.is_correct) for verdict in verdicts]
        return found


class _Curve:
    """Held-out accuracy by step, out of what a run logs."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the accuracy where the line has one."""
        if "held_out_accuracy" in metrics:
            self.points.append((step, metrics["held_out_accuracy"]))
