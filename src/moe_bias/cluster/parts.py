"""What a worker of reinforcement learning does: samples its parts of a step, and keeps what it learns from.

A part is what the sampler answers at once, a batch of problems. Of its samples rewards, lengths and entropies are
told; hidden states stay. Once the threshold is known the worker keeps the selected tokens, and later gives sums over
them: routed tokens, KL, gradients.

Shapes: N samples, T tokens, E experts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_bias.cluster.exact import Whole, whole
from moe_bias.cluster.model import NamedModel
from moe_bias.cluster.pool import Worker
from moe_bias.cluster.weights import Change, Row, Weights, put
from moe_bias.config import LayerConfig, RLConfig
from moe_bias.frozen import Frozen
from moe_bias.layer import itself
from moe_bias.rollout.sampler import Rollouts, SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.tasks.rewards import RewardRules, Rewards
from moe_bias.tasks.task import Problem, Task
from moe_bias.training.collect import Curriculum, Judged
from moe_bias.training.objectives import Objective, Sampled
from moe_bias.training.problems import TaskData, judge_of
from moe_bias.training.step_tokens import Minibatches, Tokens

Key = tuple[int, int]
"""A part of a step: the round that it was sampled in, and its number there."""


@dataclass(frozen=True)
class PartWork:
    """A part to sample: its problems with their prompts, their places among those of the round, and the round's seed.

    `with_texts`: the answers are wanted, for a log.
    """

    key: Key
    places: list[int]
    problems: list[Problem]
    prompts: list[list[int]]
    seed: int
    with_texts: bool


@dataclass(frozen=True)
class PartSamples:
    """What is told of a part's N samples. `judged` are without problems, and without texts where none were wanted.

    `entropy` (T,) float32 of the tokens that the layer acted on, sample after sample, of which `tokens` (N,) counts
    each sample's.
    """

    judged: list[Judged]
    tokens: NDArray[np.int64]
    entropy: NDArray[np.float32]
    sampling_seconds: float
    judging_seconds: float
    reward_calls: int
    reward_failures: int
    first_failure: str


@dataclass(frozen=True)
class Chosen:
    """Which tokens of a part are selected: those of entropy at least `threshold` in samples that are kept.

    `advantage` (N,) float32, NaN for a sample that is not kept.
    """

    advantage: NDArray[np.float32]
    threshold: float


@dataclass(frozen=True)
class Placing:
    """Where a step's selected tokens stand among all: their number in each sample of the step, in order (S,)."""

    counts: NDArray[np.int32]
    step: int


@dataclass(frozen=True)
class PartSums:
    """Of a part's tokens in a minibatch, told beside the gradient: summands of the loss and of its metrics."""

    key: Key
    loss: float
    load_balance: float
    metrics: Mapping[str, float]
    sampler_gap: float
    router_entropy: float


@dataclass(frozen=True)
class Seen:
    """Of the layer as it is: sums of KL over a part's tokens, and (E,) routed tokens of the next minibatch."""

    key: Key
    kl: float | None
    kl_from_sampler: float | None
    routed: NDArray[np.int64] | None


@dataclass(frozen=True)
class PolicySpec:
    """All that a worker is told once. `task` verifies and has no problems."""

    model: NamedModel
    layer: LayerConfig
    strength: float
    settings: RLConfig
    task: Task
    rules: RewardRules
    objective: Objective
    choices: SamplingChoices


@dataclass
class _Part:
    rollouts: Rollouts
    tokens: Tokens | None = None
    minibatches: list[Tensor] | None = None


class PolicyWorker(Worker):
    """Samples and learns for the parts that are given to it; forgets them when another step begins."""

    def __init__(self, spec: PolicySpec) -> None:
        self._spec = spec
        self._parts: dict[Key, _Part] = {}
        self._step = -1
        self._weights = Weights(np.zeros(0, np.float32), np.zeros(0, np.float32))
        self._wholes: list[tuple[int, int]] = []

    def load(self, on_gpu: bool) -> None:
        """Loads the model, and makes a layer for it."""
        self._base: Frozen = self._spec.model.loaded(on_gpu)
        head, spec = self._base.head, self._spec
        self._layer = head.layer(spec.layer).to(head.device)
        self._layer.strength = spec.strength
        self._sampler = TransformersSampler(self._base.model, head, int(spec.settings.sample_budget))
        self._rewards = Rewards(spec.rules)
        empty = Curriculum([], [])
        data = TaskData(self._base, spec.task, empty, empty, list(spec.choices.stop_ids))
        self._judge = judge_of(data, self._rewards, spec.settings.max_new_tokens)
        self._columns = head.columns(self._layer.support_or_all().to(head.device))

    def sample(self, work: PartWork, step: int, row: Row | None) -> PartSamples:
        """Samples a part; `row` are the weights of the step's beginning, for the first part of a step."""
        if row is not None:
            self._step, self._parts, self._weights = step, {}, Weights(row, row)
            put(row, self._layer)
            self._at_start = copy.deepcopy(self._layer).requires_grad_(False)
        assert step == self._step
        before, started = copy.copy(self._rewards.failures), time.perf_counter()
        rollouts = self._sampler.sample_batch(work.prompts, work.places, self._at_start, self._spec.choices, work.seed)
        sampled = time.perf_counter()
        group = self._spec.choices.group
        judged = self._judge([problem for problem in work.problems for _ in range(group)], rollouts)
        self._parts[work.key] = _Part(rollouts)
        failures = self._rewards.failures
        biased_T = rollouts.biased
        return PartSamples(
            [_told(one, work.with_texts) for one in judged],
            rollouts.features.example[biased_T].bincount(minlength=len(judged)).numpy(),
            rollouts.policy_entropy[biased_T].numpy(),
            sampled - started,
            time.perf_counter() - sampled,
            failures.calls - before.calls,
            failures.failures - before.failures,
            failures.first,
        )

    def select(self, keys: Sequence[Key], chosen: Mapping[Key, Chosen]) -> dict[Key, NDArray[np.int32]]:
        """Keeps the selected tokens of these parts alone; how many there are of each sample (N,)."""
        return {key: self._select(self._parts[key], chosen[key]) for key in keys}

    def _select(self, part: _Part, chosen: Chosen) -> NDArray[np.int32]:
        rollouts, advantage_N = part.rollouts, torch.from_numpy(chosen.advantage.copy())
        example_T = rollouts.features.example
        selected_T = ~advantage_N.isnan()[example_T] & rollouts.biased & (rollouts.policy_entropy >= chosen.threshold)
        batch = rollouts.features.at(selected_T)
        sampled = Sampled(rollouts.log_prob[selected_T], advantage_N[batch.example])
        spec, head = self._spec, self._base.head
        if len(batch):
            own = (self._layer, head, spec.settings, spec.objective, self._columns)
            part.tokens = Tokens(*own, batch, sampled, self._at_start)
        part.rollouts = _without_tokens(rollouts)
        return batch.example.bincount(minlength=len(advantage_N)).numpy().astype(np.int32)

    def place(self, keys: Sequence[Key], starts: Mapping[Key, NDArray[np.int64]], placing: Placing) -> None:
        """Finds out which tokens of these parts each minibatch has; `starts` (N,) is each sample's first token's place.

        All minibatches are drawn, as the process that began draws them.
        """
        counts_S = torch.from_numpy(placing.counts.copy())
        example_T = torch.arange(len(counts_S)).repeat_interleave(counts_S)
        settings, unit = self._spec.settings, self._spec.objective.unit
        minibatches = Minibatches.of(example_T, unit, settings, placing.step)
        here = {key: tokens for key in keys if (tokens := self._parts[key].tokens) is not None}
        owner_T = torch.full((len(example_T),), -1)
        firsts, first = {}, 0
        for key, tokens in here.items():
            place_T = _places(tokens.batch.example.cpu(), torch.from_numpy(starts[key].copy()))
            owner_T[place_T] = first + torch.arange(len(place_T))
            firsts[key], first = first, first + len(place_T)
            self._parts[key].minibatches = []
        self._wholes = []
        for units in minibatches.drawn():
            index_T = minibatches.units.tokens_of(units)
            self._wholes.append((len(units), len(index_T)))
            own_T = owner_T[index_T]
            for key, tokens in here.items():
                start = firsts[key]
                mine_T = own_T[(own_T >= start) & (own_T < start + len(tokens.batch))] - start
                own = self._parts[key].minibatches
                assert own is not None
                own.append(mine_T)

    def look(
        self, keys: Sequence[Key], change: Change, kl: bool, kl_from_sampler: bool, next_one: int | None
    ) -> list[Seen]:
        """Takes up a change of the weights; then what is asked of each part that has selected tokens."""
        self._take_up(change)
        return [
            Seen(
                key,
                len(tokens.batch) * tokens.kl() if kl else None,
                len(tokens.batch) * tokens.kl_from_sampler() if kl_from_sampler else None,
                None if next_one is None else self._routed(key, tokens, next_one),
            )
            for key, tokens in self._with_tokens(keys)
        ]

    def learn(
        self, keys: Sequence[Key], change: Change, number: int, routed: NDArray[np.int64], level: int, parts: int
    ) -> tuple[Whole | None, list[PartSums]]:
        """The sum of the gradients of these parts' tokens in a minibatch, in quanta, and what else is told of each.

        `routed` (E,) are those of the whole minibatch, of `parts` parts. None where the quantum is too small.
        """
        self._take_up(change)
        self._weights.hold()
        size = sum(parameter.numel() for parameter in self._layer.parameters())
        total_N: Whole | None = np.zeros(size, np.int64)
        told = []
        for key, tokens in self._with_tokens(keys):
            index_T = self._minibatch(key, number)
            if len(index_T):
                gradient_N, sums = self._gradient(key, tokens, index_T.to(self._base.device), number, routed)
                told.append(sums)
                part_N = whole(gradient_N, level, parts)
                total_N = None if total_N is None or part_N is None else total_N + part_N
        return total_N, told

    def _gradient(
        self, key: Key, tokens: Tokens, index_T: Tensor, number: int, routed: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], PartSums]:
        for parameter in self._layer.parameters():
            parameter.grad = None
        loss = tokens.gradients(index_T, _WholeBatch(*self._wholes[number], torch.from_numpy(routed.copy())))
        rows = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten().cpu().float()
            for parameter in self._layer.parameters()
        ]
        sums = PartSums(
            key,
            float(loss.total),
            float(loss.load_balance),
            {name: float(value) for name, value in loss.metrics.items()},
            tokens.gap(loss, index_T),
            float(torch.special.entr(loss.routing.probs).sum()),
        )
        return torch.cat(rows).numpy(), sums

    @torch.no_grad()
    def _routed(self, key: Key, tokens: Tokens, number: int) -> NDArray[np.int64]:
        """(E,) tokens of the part in a minibatch that go to each expert."""
        batch = tokens.batch.at(self._minibatch(key, number).to(self._base.device))
        gates_TE = self._layer.mix(batch.hidden, batch.entropy).routing.gates
        return (gates_TE > 0).sum(0).cpu().numpy()

    def _with_tokens(self, keys: Sequence[Key]) -> list[tuple[Key, Tokens]]:
        return [(key, tokens) for key in sorted(keys) if (tokens := self._parts[key].tokens) is not None]

    def _minibatch(self, key: Key, number: int) -> Tensor:
        minibatches = self._parts[key].minibatches
        assert minibatches is not None
        return minibatches[number]

    def _take_up(self, change: Change) -> None:
        if change is not None:
            self._weights.apply(change)
            put(self._weights.now, self._layer)


class _WholeBatch:
    """Sums over all parts of a minibatch that are known before: asked for in the order in which `gradients` does."""

    def __init__(self, units: int, tokens: int, routed_E: Tensor) -> None:
        self._known = [torch.tensor(float(units)), routed_E, torch.tensor(float(tokens))]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Units, then tokens by expert, then tokens; of anything else this part's summand."""
        if not self._known:
            return itself(tensor)
        known = self._known.pop(0).to(tensor)
        assert known.shape == tensor.shape
        return known


def _told(one: Judged, with_text: bool) -> Judged:
    """Without the problem, which whoever asked has."""
    answer = one.verdict.answer if with_text else None
    verdict = type(one.verdict)(one.verdict.outcome, answer, one.verdict.reward)
    return Judged(_NO_PROBLEM, one.text if with_text else "", one.tokens, one.finished, verdict, one.reward)


_NO_PROBLEM = Problem("", "")


def _without_tokens(rollouts: Rollouts) -> Rollouts:
    """Gives the memory of tokens back that were not selected."""
    none = torch.zeros(0, dtype=torch.int64)
    nothing = rollouts.log_prob[:0]
    return Rollouts(rollouts.features.at(none), nothing, nothing, nothing.bool(), nothing.bool(), [], 0, 0.0)


def _places(example_T: Tensor, start_N: Tensor) -> Tensor:
    """The place (T,) of each token among all, the tokens of each sample being one after the other."""
    counts_N = example_T.bincount(minlength=len(start_N))
    first_N = counts_N.cumsum(0) - counts_N
    return start_N[example_T] + torch.arange(len(example_T)) - first_N[example_T]
