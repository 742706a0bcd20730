"""Training by rewards, from Python and for `moe-bias train rl`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from moe_bias.adapter import save_layer
from moe_bias.api.arguments import config_of, refuse_other_base, refuse_other_layer
from moe_bias.api.reports import RLReport
from moe_bias.api.run_place import folder_of_adapter
from moe_bias.cluster.model import NamedModel, model_of_workers
from moe_bias.cluster.policy import PartsCollector, policy_pool
from moe_bias.config import Cluster, RewardConfig, RLConfig
from moe_bias.evaluation.statistics import mean, wilson
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.progress import say, text_console
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.rollout.sampler import Sampler
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.rewards import Rewards
from moe_bias.tasks.task import Task, of_bad_golds
from moe_bias.training.advantage import Advantage
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.collect import Collects, Selection
from moe_bias.training.loop import Callback, Watching
from moe_bias.training.metrics import HELD_OUT_ACCURACY, HELD_OUT_TOKENS, MetricsLog, SampleLog, read_metrics
from moe_bias.training.objectives import Objective, make_objective
from moe_bias.training.problems import (
    Beginning,
    TaskData,
    collector_of,
    fresh_policy_layer,
    graded_answers,
    policy_of,
    rewards_of,
    task_data,
)
from moe_bias.training.rl import PolicyPosition, PolicyTrainer, objective_of
from moe_bias.training.run_folder import begin
from moe_bias.training.sft import refuse_impossible


@dataclass(frozen=True)
class Watch:
    """How often a run is looked at: steps between evaluations, between samples that are kept, between checkpoints."""

    evaluate_every: int = 10
    show_every: int = 10
    checkpoint_every: int = 1
    keep_checkpoints: int = 2


def train_rl(
    base: Frozen,
    task: Task | str,
    layer: MoEBiasLayer | None = None,
    config: RLConfig | None = None,
    *,
    reward: Any = None,
    objective: Objective | str | None = None,
    advantage: Advantage | None = None,
    selection: Selection | None = None,
    callbacks: Sequence[Callback] = (),
    rewards: RewardConfig | None = None,
    train_problems: int = 600,
    test_problems: int = 200,
    watch: Watch | None = None,
    output: str | Path | None = None,
    cluster: Cluster | None = None,
) -> tuple[MoEBiasLayer, RLReport]:
    """Trains a layer by rewards on a task's problems; returns it with what that does to greedy answers to others.

    It is a copy of `layer`, such as one that supervised training made; without one a fresh layer of the config's
    choices, its support chosen on the frozen model's own samples. An answer's reward is its verdict (1 where it is
    right, else 0); or what `reward(prompt, completion, gold)` says, from 0 to 1; or what `rewards` weighs. A step
    samples, verifies and updates: `advantage` says what each sample is worth among those of its problem (None: its
    reward less their mean, over their standard deviation), `selection`
    which tokens are learnt from (None: those of highest entropy, the config's `rho`), `objective` what is minimised
    on them (None: `DAPO` with the config's terms). `watch` says how often the run is looked at; `callbacks` are told
    of every step, and may end the run. In `output` it leaves metrics, samples
    and checkpoints, from which the same call goes on after an interrupt; and at its end the adapter with its record.
    The workers of a `cluster` sample and learn, each its part of a step; the layer has the same bytes with any number.

    Raises UserError on settings that cannot be, on a task with too few problems, on a reward that fails on a first
    sample, where `output` holds an adapter or a run of other settings, and where rewards stay equal, so that there is
    nothing to learn from; Interrupted on Ctrl-C, saying where the same call goes on.
    """
    refuse_other_base(base)
    if layer is not None:
        refuse_other_layer(layer, base)
    config, watch, task = config_of(config, RLConfig), watch or Watch(), make_task(task, {}, small=True)
    seams = Seams(make_objective(objective), advantage, selection, callbacks)
    model = model_of_workers(cluster, base)
    weighed = rewards_of(rewards or RewardConfig(**({} if reward is None else REWARD_ALONE)), reward)
    weighed.check_limit(config.max_new_tokens)
    data = task_data(base, task, task.problems(train_problems + test_problems, config.seed), train_problems)
    made_with = {
        **config.model_dump(mode="json"),
        "task": task.name,
        **reward_record(reward, rewards),
    }
    weighed.try_on(data.train.problems[0])
    if layer is None:
        refuse_impossible(config, base.head)
    with folder_of_adapter(output, "rl", made_with) as folder:
        begin_run(folder, data, made_with)
        beginning = fresh_policy_layer(data, config) if layer is None else Beginning(copy.deepcopy(layer), None)
        run = Run(data, weighed, config, watch, folder, beginning, seams=seams, cluster=cluster, model=model)
        report, position = run.trained(None)
        if output is not None:
            run.save(report, position, made_with)
    return beginning.layer, report


def reward_record(reward: Any, rewards: RewardConfig | None) -> dict[str, Any]:
    """What a record says of the rewards: a function of one's own by its name."""
    own = getattr(reward, "__qualname__", None if reward is None else type(reward).__name__)
    return {"reward": own, **(rewards or RewardConfig()).model_dump(mode="json", exclude={"reward"})}


REWARD_ALONE = {"verdict_weight": 0.0, "reward_weight": 1.0}


def begin_run(folder: Path, data: TaskData, made_with: Mapping[str, Any]) -> None:
    """The folder is this run's from then on. Raises UserError where it is another's, which is not finished."""
    questions = json.dumps([problem.question for problem in data.train.problems])
    begin(folder, made_with, {"problems": hashlib.sha256(questions.encode()).hexdigest()})


@dataclass(frozen=True)
class Seams:
    """What Python may put in place of the method's own parts; None leaves them."""

    objective: Objective | None = None
    advantage: Advantage | None = None
    selection: Selection | None = None
    callbacks: Sequence[Callback] = ()


@dataclass(frozen=True)
class Run:
    """One run of reinforcement learning in a folder, and the layer that it begins with, which it trains in place."""

    data: TaskData
    rewards: Rewards
    config: RLConfig
    watch: Watch
    folder: Path
    beginning: Beginning
    margin: float | None = None
    console: Console | None = None
    seams: Seams = field(default_factory=Seams)
    cluster: Cluster | None = None
    model: NamedModel | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """Those of the folder."""
        return Checkpoints(self.folder, self.watch.checkpoint_every, self.watch.keep_checkpoints)

    def trained(self, sampler: Sampler | None) -> tuple[RLReport, PolicyPosition]:
        """Trains from the last checkpoint, where there is one, and measures; by the frozen model without a sampler."""
        started_with = copy.deepcopy(self.beginning.layer)
        try:
            position = self._train(sampler)
        except KeyboardInterrupt as interrupt:
            raise self.checkpoints.interrupted() from interrupt
        return self._report(started_with, position), position

    def _train(self, sampler: Sampler | None) -> PolicyPosition:
        saved = self.checkpoints.load(PolicyPosition)
        after = saved[1].step if saved else 0
        log, samples = MetricsLog(self.folder, after), SampleLog(self.folder, self.watch.show_every, after)
        watching = Watching(
            self._held_out,
            self.watch.evaluate_every,
            self.checkpoints,
            log,
            samples,
            callbacks=self.seams.callbacks,
        )
        try:
            with closing(log), closing(samples), self._collector(sampler) as collector:
                trainer = PolicyTrainer(
                    self.beginning.layer, self.data.head, collector, self.config, watching, self.seams.objective
                )
                if saved is not None:
                    trainer.resume(*saved)
                return trainer.run()
        finally:
            if self.rewards.failures.failures:
                say(self.console or text_console(), str(self.rewards.failures))

    @contextmanager
    def _collector(self, sampler: Sampler | None) -> Iterator[Collects]:
        """What collects the samples, here or by workers; those end with the block."""
        if self.cluster is not None and self.model is not None:
            if self.seams.selection is not None:
                raise UserError("`selection` sees all tokens at once, which are not in one place on a `cluster`")
            objective = objective_of(self.config, self.seams.objective)
            own = (self.data, self.rewards, self.config, objective)
            with policy_pool(self.cluster, self.model, self.beginning.layer, *own, self.console) as pool:
                yield PartsCollector(pool, *own, self.seams.advantage, self.watch.show_every)
            return
        usual = collector_of(self.data, self.rewards, self.config, sampler, self.margin)
        advantage = self.seams.advantage or usual.advantage
        yield replace(usual, advantage=advantage, selection=self.seams.selection)

    def _held_out(self, layer: MoEBiasLayer) -> dict[str, float]:
        """Accuracy and length of greedy answers."""
        policies = [policy_of(layer, self.data.head)]
        answers = graded_answers(self.data, self.data.test, policies, self.config, "held-out problems")[0]
        return {
            HELD_OUT_ACCURACY: float(np.mean([answer.verdict.is_correct for answer in answers])),
            HELD_OUT_TOKENS: float(np.mean([answer.tokens for answer in answers])),
        }

    def _report(self, started_with: MoEBiasLayer, position: PolicyPosition) -> RLReport:
        layers = {"base": None, "start": started_with, "trained": self.beginning.layer}
        policies = [policy_of(layer, self.data.head) for layer in layers.values()]
        columns = graded_answers(self.data, self.data.test, policies, self.config, "base, start and trained policy")
        answers = dict(zip(layers, columns, strict=True))
        right = {name: np.array([one.verdict.is_correct for one in column], float) for name, column in answers.items()}
        tokens = {name: np.array([one.tokens for one in column], float) for name, column in answers.items()}
        held_out = zip(self.data.test.problems, answers["base"], strict=True)
        unread = [problem.gold for problem, answer in held_out if answer.verdict.outcome == "bad gold"]
        if unread:
            say(self.console or text_console(), f"{of_bad_golds(unread, len(self.data.test.problems))}.")
        return RLReport(
            accuracy={name: wilson(int(values.sum()), len(values)) for name, values in right.items()},
            change=mean(right["trained"] - right["start"]),
            right={name: [bool(value) for value in values] for name, values in right.items()},
            tokens={name: mean(values) for name, values in tokens.items()},
            tokens_change=mean(tokens["trained"] - tokens["start"]),
            lengths={name: [int(value) for value in values] for name, values in tokens.items()},
            steps=position.step,
            sampled_tokens=position.sampled_tokens,
            seconds=position.seconds,
            update_seconds=position.update_seconds,
            curve=read_metrics(self.folder),
        )

    def save(self, report: RLReport, position: PolicyPosition, made_with: Mapping[str, Any]) -> None:
        """Writes the record and then the adapter, so that none is without its record."""
        record = {
            "kind": RecordKind.POLICY,
            "settings": made_with,
            "provenance": provenance(),
            "accuracy": {name: asdict(value) for name, value in report.accuracy.items()},
            "change": asdict(report.change),
            "right": {name: [float(value) for value in values] for name, values in report.right.items()},
            "tokens": {name: asdict(value) for name, value in report.tokens.items()},
            "tokens_change": asdict(report.tokens_change),
            "lengths": report.lengths,
            "position": asdict(position),
        }
        write_json(self.folder / "record.json", record)
        save_layer(self.beginning.layer, self.folder, self.data.base.model, self.beginning.fork_coverage)
