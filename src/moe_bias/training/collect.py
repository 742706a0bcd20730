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

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_bias.config import RLConfig
from moe_bias.features.extract import Features, joined
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.rollout.sampler import Rollouts, Sampler, SamplingChoices
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import Verdict
from moe_bias.training.advantage import Advantage, check_advantages, group_advantages, select_high_entropy
from moe_bias.training.batches import mixed_seed
from moe_bias.training.objectives import Sampled
from moe_bias.training.step_tokens import StepTokens


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
    judging. `elsewhere` are the selected tokens where they are not in this process, and `moved` the bytes that samples
    had moved between machines, by the names of their metrics.
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
    elsewhere: StepTokens | None = None
    moved: Mapping[str, float] = field(default_factory=dict)

    @property
    def selected(self) -> int:
        """How many tokens were selected."""
        tokens = self.batch if self.elsewhere is None else self.elsewhere
        return 0 if tokens is None else len(tokens)

    @property
    def rewards(self) -> list[float]:
        """Of all samples."""
        return [one.reward for one in self.judged]

    @property
    def outcomes(self) -> Counter[str]:
        """How many samples had each outcome."""
        return Counter(one.verdict.outcome for one in self.judged)


@dataclass(frozen=True)
class Candidates:
    """The tokens of kept groups: their features, how they were sampled, and the sampling policy's entropy (T,) in nats.

    `has_hidden` (T,) bool: whether the sampler gave a token's hidden state; only those can be learnt from.
    """

    features: Features
    sampled: Sampled
    entropy: Tensor
    has_hidden: Tensor


Selection = Callable[[Candidates], Tensor]
"""Which tokens to learn from, (T,) bool; all of a step's candidates are given together."""


@dataclass(frozen=True)
class HighEntropy:
    """Selects the share `rho` of highest entropy, ties included."""

    rho: float

    def __call__(self, candidates: Candidates) -> Tensor:
        """(T,) bool."""
        return select_high_entropy(candidates.entropy, self.rho)[0]


class Collects(Protocol):
    """Whatever collects a step's samples."""

    def collect(self, layer: MoEBiasLayer, step: int, last_threshold: float | None = None) -> Collected:
        """See `Collector`."""


@dataclass(frozen=True)
class Collector:
    """Collects a step's samples from a sampler.

    With a `margin`, the sampler is asked for hidden states of those tokens alone whose entropy is at most
    so many nats below the threshold of the step before (None: of all). `advantage` says what each sample is worth
    among those of its prompt, `selection` which tokens are learnt from (None: `HighEntropy` with the settings' `rho`).
    """

    sampler: Sampler
    curriculum: Curriculum
    judge: Judge
    settings: RLConfig
    choices: SamplingChoices
    margin: float | None = None
    advantage: Advantage = group_advantages
    selection: Selection | None = None

    def collect(self, layer: MoEBiasLayer, step: int, last_threshold: float | None = None) -> Collected:
        """The samples of step `step`, counted from 0, under the layer as it is.

        `last_threshold` is the entropy from which tokens were selected in the step before, where there was one.
        """
        parts, judged, seconds = list[Candidates](), list[Judged](), [0.0, 0.0]
        choices = self.choices
        if self.margin is not None and last_threshold is not None:
            choices = replace(choices, keep_above=max(last_threshold - self.margin, 0.0))

        def sample(chosen: Sequence[int], seed: int) -> int:
            part, seen, spent = self._round(layer, chosen, choices, seed)
            judged.extend(seen)
            seconds[:] = [before + more for before, more in zip(seconds, spent, strict=True)]
            if part is None:
                return 0
            parts.append(part)
            return int(part.features.example.unique().numel()) // self.settings.group

        sample_rounds(self.settings, len(self.curriculum.problems), step, sample)
        return self._selected(parts, judged, seconds)

    def order(self, step: int) -> list[int]:
        """Numbers of a step's problems: see `step_order`."""
        return step_order(self.settings, len(self.curriculum.problems), step)

    def _round(
        self, layer: MoEBiasLayer, chosen: Sequence[int], choices: SamplingChoices, seed: int
    ) -> tuple[Candidates | None, list[Judged], tuple[float, float]]:
        started = time.perf_counter()
        rollouts = self.sampler.sample([self.curriculum.prompts[i] for i in chosen], layer, choices, seed, "")
        sampled = time.perf_counter()
        problems = [self.curriculum.problems[i] for i in chosen for _ in range(self.choices.group)]
        judged = self.judge(problems, rollouts)
        part = self._candidates(rollouts, torch.tensor([one.reward for one in judged], dtype=torch.float64))
        return part, judged, (sampled - started, time.perf_counter() - sampled)

    def _candidates(self, rollouts: Rollouts, reward_N: Tensor) -> Candidates | None:
        """The tokens of groups that are kept, where the layer acted on them; None without any."""
        advantage_N, kept_N = self.advantage(reward_N, rollouts.group)
        check_advantages(advantage_N, kept_N, reward_N)
        example_T = rollouts.features.example
        kept_T = kept_N[example_T] & rollouts.biased
        if not kept_T.any():
            return None
        advantage_T = advantage_N[example_T[kept_T]].to(rollouts.log_prob.dtype)
        return Candidates(
            rollouts.features.at(kept_T),
            Sampled(rollouts.log_prob[kept_T], advantage_T),
            rollouts.policy_entropy[kept_T],
            rollouts.kept[kept_T],
        )

    def _selected(self, parts: Sequence[Candidates], judged: list[Judged], seconds: list[float]) -> Collected:
        if not parts:
            return Collected(None, None, 0.0, math.inf, 0, 0.0, judged, seconds[0], seconds[1])
        candidates = _together(parts)
        entropy_T = candidates.entropy
        selected_T = (self.selection or HighEntropy(self.settings.rho))(candidates)
        if selected_T.dtype != torch.bool or selected_T.shape != entropy_T.shape:
            raise UserError(
                f"the selection of tokens gave {selected_T.dtype} of shape {tuple(selected_T.shape)}, not "
                f"{len(entropy_T)} of bool, one for each token"
            )
        threshold = float(entropy_T[selected_T].min()) if selected_T.any() else math.inf
        selected_T = selected_T & candidates.has_hidden
        taught = sum(part.features.example.unique().numel() for part in parts) / len(judged)
        any_selected = bool(selected_T.any())
        return Collected(
            candidates.features.at(selected_T) if any_selected else None,
            candidates.sampled.at(selected_T) if any_selected else None,
            taught,
            threshold,
            len(entropy_T),
            float(entropy_T.mean()),
            judged,
            seconds[0],
            seconds[1],
        )


def sample_rounds(settings: RLConfig, problems: int, step: int, sample: Callable[[Sequence[int], int], int]) -> None:
    """Samples a step's problems, of so many, then others in the place of groups that were not kept.

    `sample` is given numbers of problems and a seed, and says how many of their groups are kept.
    """
    order = step_order(settings, problems, step)
    wanted = min(settings.prompts, len(order))
    for round_ in range(settings.resamples + 1):
        chosen, order = order[:wanted], order[wanted:]
        if not chosen:
            return
        wanted -= sample(chosen, mixed_seed(settings.seed, step, round_))
        if wanted <= 0:
            return


def step_order(settings: RLConfig, problems: int, step: int) -> list[int]:
    """Numbers of a step's problems: as many different problems as the step could need, in a random order."""
    needed = min(settings.prompts * (settings.resamples + 1), problems)
    return random.Random(mixed_seed(settings.seed, step)).sample(range(problems), needed)


def _together(parts: Sequence[Candidates]) -> Candidates:
    sampled = [part.sampled for part in parts]
    return Candidates(
        joined([part.features for part in parts]),
        Sampled(torch.cat([one.log_prob for one in sampled]), torch.cat([one.advantage for one in sampled])),
        torch.cat([part.entropy for part in parts]),
        torch.cat([part.has_hidden for part in parts]),
    )
