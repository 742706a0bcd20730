"""One step's samples: drawn, verified, rewarded, and cut down to the tokens that a step learns from.

Dynamic sampling (DAPO, arXiv 2503.14476): a group whose rewards are all equal teaches nothing. It is
left out, and more problems are sampled in its place, at most `resamples` times; then the step goes on
with the groups that it has. Which problems and which samples follows from seed and step alone, so that
a step that was interrupted is done again with the same ones.

The tokens learnt from are the share rho of highest entropy of the sampling policy, at the sampling
temperature. The threshold is taken over all tokens of the kept groups (`select_high_entropy`), end
tokens included; only the selected tokens' hidden states are kept.

Shapes: N samples, T tokens.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_bias.config import RLConfig
from moe_bias.features.extract import Features, joined
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.sampler import Rollouts, Sampler, SamplingChoices
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import Verdict
from moe_bias.training.policy_objective import Sampled, group_advantages, select_high_entropy


@dataclass(frozen=True)
class Judged:
    """An answer to a problem: its text, its tokens, whether it ended by itself, verdict and shaped reward."""

    problem: Problem
    text: str
    tokens: int
    finished: bool
    verdict: Verdict
    reward: float

    def as_line(self) -> dict[str, Any]:
        """For a log of samples."""
        return {
            "question": self.problem.question,
            "gold": self.problem.gold,
            "completion": self.text,
            "outcome": self.verdict.outcome,
            "answer": self.verdict.answer,
            "reward": self.reward,
            "tokens": self.tokens,
        }


Judge = Callable[[Sequence[Problem], Rollouts], list[Judged]]
"""From each sample's problem and the samples to what they are worth."""


@dataclass(frozen=True)
class Curriculum:
    """The problems to train on, with their prompts as token ids."""

    problems: Sequence[Problem]
    prompts: Sequence[list[int]]


@dataclass(frozen=True)
class Collected:
    """What a step learns from, and what it saw.

    `batch` and `sampled` hold the selected tokens; `taught` is the share of the sampled groups that were kept;
    `threshold` in nats, `tokens` of the kept groups
    together and `entropy`, their mean under the sampling policy in nats; infinite, 0 and 0 where no
    group was kept. `judged` are all samples, those of dropped groups too. Seconds of sampling and of
    judging.
    """

    batch: Features | None
    sampled: Sampled | None
    taught: float
    threshold: float
    tokens: int
    entropy: float
    judged: list[Judged]
    sampling_seconds: float
    judging_seconds: float

    @property
    def rewards(self) -> list[float]:
        """Of all samples."""
        return [one.reward for one in self.judged]

    @property
    def outcomes(self) -> Counter[str]:
        """How many samples had each outcome."""
        return Counter(one.verdict.outcome for one in self.judged)


@dataclass(frozen=True)
class _Part:
    """The kept groups of one round of sampling: all their tokens."""

    features: Features
    sampled: Sampled
    entropy: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Collector:
    """Collects a step's samples from a sampler.

    With a `margin`, the sampler is asked for hidden states of those tokens alone whose entropy is at most
    so many nats below the threshold of the step before (None: of all).
    """

    sampler: Sampler
    curriculum: Curriculum
    judge: Judge
    settings: RLConfig
    choices: SamplingChoices
    margin: float | None = None

    def collect(self, layer: MoEBiasLayer, step: int, last_threshold: float | None = None) -> Collected:
        """The samples of step `step`, counted from 0, under the layer as it is.

        `last_threshold` is the entropy from which tokens were selected in the step before, where there was one.
        """
        settings, parts, judged = self.settings, list[_Part](), list[Judged]()
        choices = self.choices
        if self.margin is not None and last_threshold is not None:
            choices = replace(choices, keep_above=max(last_threshold - self.margin, 0.0))
        seconds = [0.0, 0.0]
        order = self.order(step)
        wanted = min(settings.prompts, len(order))
        for round_ in range(settings.resamples + 1):
            chosen, order = order[:wanted], order[wanted:]
            if not chosen:
                break
            part, seen, spent = self._round(layer, chosen, choices, _mixed(settings.seed, step, round_))
            judged += seen
            seconds = [before + more for before, more in zip(seconds, spent, strict=True)]
            if part is not None:
                parts.append(part)
                wanted -= int(part.features.example.unique().numel()) // settings.group
            if wanted <= 0:
                break
        return self._selected(parts, judged, seconds)

    def order(self, step: int) -> list[int]:
        """Numbers of a step's problems: as many different problems as the step could need, in a random order."""
        problems = len(self.curriculum.problems)
        needed = min(self.settings.prompts * (self.settings.resamples + 1), problems)
        return random.Random(_mixed(self.settings.seed, step)).sample(range(problems), needed)

    def _round(
        self, layer: MoEBiasLayer, chosen: Sequence[int], choices: SamplingChoices, seed: int
    ) -> tuple[_Part | None, list[Judged], tuple[float, float]]:
        started = time.perf_counter()
        rollouts = self.sampler.sample([self.curriculum.prompts[i] for i in chosen], layer, choices, seed, "")
        sampled = time.perf_counter()
        problems = [self.curriculum.problems[i] for i in chosen for _ in range(self.choices.group)]
        judged = self.judge(problems, rollouts)
        part = _kept_part(rollouts, torch.tensor([one.reward for one in judged], dtype=torch.float64))
        return part, judged, (sampled - started, time.perf_counter() - sampled)

    def _selected(self, parts: Sequence[_Part], judged: list[Judged], seconds: Sequence[float]) -> Collected:
        if not parts:
            return Collected(None, None, 0.0, float("inf"), 0, 0.0, judged, *seconds)
        entropy_T = torch.cat([part.entropy for part in parts])
        selected_T, threshold = select_high_entropy(entropy_T, self.settings.rho)
        selected_T &= torch.cat([part.kept for part in parts])
        kept = sum(part.features.example.unique().numel() for part in parts)
        taught = kept / len(judged)
        if not selected_T.any():
            return Collected(None, None, taught, threshold, len(entropy_T), float(entropy_T.mean()), judged, *seconds)
        log_prob_T = torch.cat([part.sampled.log_prob for part in parts])
        advantage_T = torch.cat([part.sampled.advantage for part in parts])
        return Collected(
            joined([part.features for part in parts]).at(selected_T),
            Sampled(log_prob_T, advantage_T).at(selected_T),
            taught,
            threshold,
            len(entropy_T),
            float(entropy_T.mean()),
            judged,
            *seconds,
        )


def _kept_part(rollouts: Rollouts, reward_N: Tensor) -> _Part | None:
    """The tokens of groups whose rewards differ, where the layer acted on them; None without any."""
    advantage_N, kept_N = group_advantages(reward_N, rollouts.group)
    example_T = rollouts.features.example
    kept_T = kept_N[example_T] & rollouts.biased
    if not kept_T.any():
        return None
    advantage_T = advantage_N[example_T[kept_T]].to(rollouts.log_prob.dtype)
    return _Part(
        rollouts.features.at(kept_T),
        Sampled(rollouts.log_prob[kept_T], advantage_T),
        rollouts.policy_entropy[kept_T],
        rollouts.kept[kept_T],
    )


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
