"""A step of reinforcement learning on several machines, among which no hidden state travels.

The problems of a round are cut into the batches that one process would sample, longest prompts first: parts, which do
not depend on how many workers there are, with the samples that one process would draw. Advantages are of groups, so
rewards suffice for them. The threshold of entropy is the exact quantile over all workers' tokens, whose entropies are
told. For each update a worker sends the sum of its parts' gradients in whole numbers (`exact`), and gets the new
weights. Departures from one process, which takes a minibatch's gradient in one product: sums of parts are rounded
otherwise, so that the learned layer is the same with any number of workers, and in the last bits another than without.

What an update moves for each worker, of a layer of A bytes of float32: A of weights, 2 A of whole numbers of 64 bits,
a few numbers for each part.

Shapes: N samples, T tokens, S samples of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from moe_bias.chunks import longest_first
from moe_bias.cluster.model import NamedModel
from moe_bias.cluster.owners import Owners
from moe_bias.cluster.parts import Chosen, Key, PartSamples, PartWork, Placing, PolicySpec, PolicyWorker
from moe_bias.cluster.pool import Pool, opened
from moe_bias.cluster.tokens_there import TokensThere
from moe_bias.cluster.weights import row_of
from moe_bias.config import Cluster, RLConfig
from moe_bias.layer import MoEBiasLayer
from moe_bias.limits import in_bytes
from moe_bias.mistakes import UserError
from moe_bias.rollout.sampling import samples_of
from moe_bias.tasks.mathematics import MathematicsTask
from moe_bias.tasks.rewards import Rewards
from moe_bias.tasks.task import Task
from moe_bias.training.advantage import Advantage, check_advantages, select_high_entropy
from moe_bias.training.collect import Collected, Judged, sample_rounds
from moe_bias.training.objectives import Objective
from moe_bias.training.problems import TaskData, advantage_of, sampler_of, sampling_choices


@contextmanager
def policy_pool(
    cluster: Cluster,
    model: NamedModel,
    layer: MoEBiasLayer,
    data: TaskData,
    rewards: Rewards,
    settings: RLConfig,
    objective: Objective,
    console: Console | None = None,
) -> Iterator[Pool]:
    """Workers that sample and learn, while the block runs. Raises UserError as `pool.opened` does."""
    own = {name: getattr(settings, name) for name in RLConfig.model_fields}
    choices = sampling_choices(settings, data)
    spec = PolicySpec(
        model, layer.config, layer.strength, RLConfig(**own), _verifier(data.task), rewards.rules, objective, choices
    )
    with opened(cluster, PolicyWorker, (spec,), model.device, console=console) as pool:
        _refuse_too_few_parts(pool, settings)
        _refuse_too_many_samples(pool, settings, sampler_of(settings, data).token_bytes)
        yield pool


def _verifier(task: Task) -> Task:
    """The task without a data set's problems, which are sent with the parts."""
    return replace(task, all_problems=()) if isinstance(task, MathematicsTask) else task


def _refuse_too_few_parts(pool: Pool, settings: RLConfig) -> None:
    parts, workers = math.ceil(settings.prompts / settings.batch_size), len(pool.members())
    if parts < workers:
        raise UserError(
            f"`batch_size` {settings.batch_size} cuts the {settings.prompts} problems of a step into {parts} parts, "
            f"fewer than the {workers} workers; lower it to {settings.prompts // workers or 1} or less, or ask for "
            "fewer workers"
        )


def _refuse_too_many_samples(pool: Pool, settings: RLConfig, token_bytes: int) -> None:
    answers = settings.prompts * settings.group * settings.max_new_tokens
    each = answers * token_bytes / len(pool.members())
    if each > settings.sample_budget:
        raise UserError(
            f"`sample_budget` {in_bytes(int(settings.sample_budget))} does not hold a worker's share of a step, up to "
            f"{in_bytes(round(each))} of hidden states; raise it, ask for more workers, or sample fewer at a time"
        )


@dataclass
class PartsCollector:
    """Collects a step's samples from the workers of a pool: `training.collect.Collects`.

    Every `texts_every` steps the answers come along.
    """

    pool: Pool
    data: TaskData
    rewards: Rewards
    settings: RLConfig
    objective: Objective
    advantage: Advantage | None = None
    texts_every: int = 1

    def collect(self, layer: MoEBiasLayer, step: int, last_threshold: float | None = None) -> Collected:
        """See `Collector`. Raises UserError where no worker can be had, or some die over one part again and again."""
        self.pool.refresh()
        traffic, started = replace(self.pool.traffic), time.perf_counter()
        samples = _StepSamples(self, Owners(self.pool, step, row_of(layer)), (step + 1) % self.texts_every == 0)
        sample_rounds(self.settings, len(self.data.train.problems), step, samples.round)
        seconds = time.perf_counter() - started
        tokens, threshold = samples.selected(layer, step)
        judging = sum(told.judging_seconds for told in samples.told.values()) / max(len(self.pool.members()), 1)
        entropy_T = samples.entropy()
        return Collected(
            None,
            None,
            samples.taught,
            threshold,
            len(entropy_T),
            float(entropy_T.mean()) if len(entropy_T) else 0.0,
            samples.judged,
            max(seconds - judging, 0.0),
            judging,
            tokens,
            {"sampling_bytes": float(self.pool.traffic.since(traffic))},
        )


@dataclass
class _Round:
    """The samples of a round in its order: which are kept, and their advantages, each (N,)."""

    keys: list[Key]
    works: dict[Key, PartWork]
    kept: Tensor
    advantage: Tensor

    def rows(self, key: Key, group: int) -> Tensor:
        """Numbers (N,) of a part's samples among those of the round."""
        return samples_of(self.works[key].places, group)


@dataclass
class _StepSamples:
    """What is told of a step's samples, round by round."""

    collector: PartsCollector
    owners: Owners
    with_texts: bool
    told: dict[Key, PartSamples] = field(default_factory=dict)
    judged: list[Judged] = field(default_factory=list)
    rounds: list[_Round] = field(default_factory=list)

    def round(self, chosen: Sequence[int], seed: int) -> int:
        """Samples these problems; how many groups are kept."""
        group, number = self.collector.settings.group, len(self.rounds)
        works = self._works(number, chosen, seed)
        for key, told in self.owners.sample(list(works.values())):
            self.told[key] = told
            self._count_failures(told)
        judged = self._in_order(works, len(chosen) * group)
        reward_N = torch.tensor([one.reward for one in judged], dtype=torch.float64)
        advantage = self.collector.advantage or advantage_of(self.collector.rewards)
        advantage_N, kept_N = advantage(reward_N, group)
        check_advantages(advantage_N, kept_N, reward_N)
        self.rounds.append(_Round(sorted(works), works, kept_N, advantage_N.float()))
        self.judged += judged
        return int(kept_N.sum()) // group

    @property
    def taught(self) -> float:
        """The share of the samples that are kept."""
        return sum(int(one.kept.sum()) for one in self.rounds) / len(self.judged)

    def entropy(self) -> Tensor:
        """(T,) float32 of all tokens of samples that are kept, sample after sample, in nats."""
        parts = [self._entropies(one) for one in self.rounds]
        return torch.from_numpy(np.concatenate([entropy for part in parts for entropy in part] or [_NONE]))

    def selected(self, layer: MoEBiasLayer, step: int) -> tuple[TokensThere | None, float]:
        """The selected tokens where they are, and the threshold in nats; None and infinity where no group is kept."""
        entropy_T = self.entropy()
        if not len(entropy_T):
            return None, math.inf
        selected_T, _ = select_high_entropy(entropy_T, self.collector.settings.rho)
        threshold = float(entropy_T[selected_T].min())
        chosen = {key: self._chosen(one, key, threshold) for one in self.rounds for key in one.keys}
        found = self.owners.ask("select", lambda _, keys: ({key: chosen[key] for key in keys},), remember=True)
        counts = {key: count_N for part in found for key, count_N in part.items()}
        places = _places(self.rounds, counts, self.collector.settings.group)
        placing = Placing(places.counts, step)
        self.owners.ask("place", lambda _, keys: ({key: places.starts[key] for key in keys}, placing), remember=True)
        collector = self.collector
        return TokensThere(self.owners, layer, collector.settings, collector.objective.unit, placing), threshold

    def _works(self, number: int, chosen: Sequence[int], seed: int) -> dict[Key, PartWork]:
        train, size = self.collector.data.train, self.collector.settings.batch_size
        batches = longest_first([train.prompts[i] for i in chosen], size)
        return {
            (number, part): PartWork(
                (number, part),
                places,
                [train.problems[chosen[place]] for place in places],
                [train.prompts[chosen[place]] for place in places],
                seed,
                self.with_texts,
            )
            for part, places in enumerate(batches)
        }

    def _in_order(self, works: dict[Key, PartWork], samples: int) -> list[Judged]:
        """What was judged, in the order of the round, with its problems."""
        found: dict[int, Judged] = {}
        group = self.collector.settings.group
        for key, work in works.items():
            rows = samples_of(work.places, group).tolist()
            for place, (row, one) in enumerate(zip(rows, self.told[key].judged, strict=True)):
                found[row] = replace(one, problem=work.problems[place // group])
        return [found[row] for row in range(samples)]

    def _entropies(self, one: _Round) -> list[NDArray[np.float32]]:
        """Of each kept sample of a round."""
        found: dict[int, NDArray[np.float32]] = {}
        for key in one.keys:
            told = self.told[key]
            ends = told.tokens.cumsum()[:-1]
            rows = one.rows(key, self.collector.settings.group).tolist()
            found |= dict(zip(rows, np.split(told.entropy, ends), strict=True))
        return [found[row] for row in sorted(found) if one.kept[row]]

    def _chosen(self, one: _Round, key: Key, threshold: float) -> Chosen:
        rows = one.rows(key, self.collector.settings.group)
        advantage_N = torch.where(one.kept[rows], one.advantage[rows], torch.nan)
        return Chosen(advantage_N.numpy(), threshold)

    def _count_failures(self, told: PartSamples) -> None:
        failures = self.collector.rewards.failures
        failures.calls += told.reward_calls
        failures.failures += told.reward_failures
        failures.first = failures.first or told.first_failure


_NONE = np.zeros(0, np.float32)


@dataclass(frozen=True)
class _Places:
    """Selected tokens of each sample of a step (S,), and for each part where those of its samples (N,) start."""

    counts: NDArray[np.int32]
    starts: dict[Key, NDArray[np.int64]]


def _places(rounds: Sequence[_Round], counts: dict[Key, NDArray[np.int32]], group: int) -> _Places:
    """Tokens stand round after round, and within one sample after sample, as one process has them."""
    in_round = []
    for one in rounds:
        count_N = np.zeros(len(one.kept), np.int32)
        for key in one.keys:
            count_N[one.rows(key, group).numpy()] = counts[key]
        in_round.append(count_N)
    count_S = np.concatenate(in_round)
    start_S = count_S.astype(np.int64).cumsum() - count_S
    starts, first = {}, 0
    for one in rounds:
        for key in one.keys:
            starts[key] = start_S[first + one.rows(key, group).numpy()]
        first += len(one.kept)
    return _Places(count_S, starts)
