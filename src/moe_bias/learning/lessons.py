"""Lessons: what is learned from feedback, as tensors; and batches of them.

A lesson holds hidden states and scalars of its tokens, so that neither text nor backbone is needed to learn it, now or
when its adapter is made again from the journal. Of the other answer of a pair the tokens before the first that differs
are left out: there both have the same likelihood.

Shapes: T tokens, D hidden, M support, A answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from moe_bias.columns import joined
from moe_bias.features.extract import Features, support_columns
from moe_bias.mistakes import UserError
from moe_bias.support import RestScalars

_SCALARS = ("logit", "entropy", "log_partition", "log_sum_exp", "mean_logit")


@dataclass(frozen=True)
class Lesson:
    """Of a pair `features` hold the better answer as example 0 and the other as 1; of a reward the answer as 0.

    `position` is a token's place in its whole answer, scalars are at temperature 1. `reward` is from -1 to 1, None of a
    pair.
    """

    features: Features
    reward: float | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def counts(self) -> Tensor:
        """(T,) bool, of a pair: the tokens from where the answers differ on."""
        other_T = self.features.example == 1
        return self.features.position >= self.features.position[other_T].min()

    def tensors(self) -> dict[str, Tensor]:
        """All that `of` needs besides the reward."""
        features = self.features
        rest = features.rest
        columns = (features.logit, features.entropy, features.log_partition, rest.log_sum_exp, rest.mean_logit)
        scalars = torch.stack([column.double() for column in columns])
        return {
            "hidden": features.hidden.contiguous(),
            "token": features.token,
            "answer": features.example,
            "position": features.position,
            "scalars": scalars,
            "support": features.support.to(torch.int32),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], vocab_size: int, reward: float | None) -> Lesson:
        """A lesson of what `tensors` gave."""
        support_M = tensors["support"].long()
        scalars = dict(zip(_SCALARS, tensors["scalars"], strict=True))
        return cls(
            Features(
                tensors["hidden"],
                tensors["token"],
                tensors["answer"],
                tensors["position"],
                scalars["logit"].float(),
                scalars["entropy"].float(),
                scalars["log_partition"],
                RestScalars(scalars["log_sum_exp"], scalars["mean_logit"]),
                support_columns(support_M, vocab_size)[tensors["token"]],
                support_M,
            ),
            reward,
        )


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def pair_parts(better: Sequence[int], other: Sequence[int], limit: int) -> tuple[slice, slice]:
    """What of a better answer's tokens and of another's to the same prompt is learned from, `limit` tokens at most.

    Raises UserError where the two are the same tokens, of which there is nothing to learn, or where they do not differ
    within the first `limit` tokens.
    """
    common = shared(better, other)
    if common == len(better) == len(other):
        raise UserError("the better answer is the answer itself, token for token; a reward of 1 says that it was right")
    if common >= limit:
        raise UserError(
            f"the answers are the same in their first {common} tokens, and {limit} of an answer are learned from; "
            "raise `lesson_tokens`"
        )
    # An answer that the better one only goes on from keeps its last token, which counts for nothing in both.
    return slice(0, limit), slice(min(common, len(other) - 1), limit)


def pair_lesson(better: Features, other: Features, limit: int) -> Lesson:
    """The lesson of a better answer and another one to the same prompt, one example each. Raises as `pair_parts`."""
    parts = pair_parts(better.token.tolist(), other.token.tolist(), limit)
    return lesson_of_parts(better.at(parts[0]), other.at(parts[1]))


def lesson_of_parts(better: Features, other: Features) -> Lesson:
    """The lesson of what `pair_parts` says of two answers; `position` is the token's place in its whole answer."""
    answer_T = torch.tensor([0] * len(better) + [1] * len(other))
    return Lesson(replace(joined([better, other]), example=answer_T))


def reward_lesson(answer: Features, reward: float, limit: int) -> Lesson:
    """The lesson of a rewarded answer. Raises UserError on a reward that is no number from -1 to 1."""
    refuse_no_reward(reward)
    answer = answer.at(slice(limit))
    return Lesson(replace(answer, example=torch.zeros_like(answer.token)), float(reward))


@dataclass(frozen=True)
class Batch:
    """Lessons as one batch: pairs first, the rewarded answers after them, numbered on from 0.

    `reward` (R,) float64 are those of the rewarded answers, `counts` (T,) bool marks their tokens of highest base
    entropy, and of a pair the tokens from where the answers differ on.
    """

    features: Features
    pairs: int
    reward: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, lessons: Sequence[Lesson], rho: float) -> Batch:
        """At least one lesson, all on one support; of each rewarded answer a share rho of the tokens are forks."""
        paired = [lesson for lesson in lessons if lesson.reward is None]
        rewarded = [lesson for lesson in lessons if lesson.reward is not None]
        parts, counts = [], []
        for number, lesson in enumerate(paired):
            parts.append(replace(lesson.features, example=lesson.features.example + 2 * number))
            counts.append(lesson.counts)
        for number, lesson in enumerate(rewarded):
            parts.append(replace(lesson.features, example=lesson.features.example + 2 * len(paired) + number))
            counts.append(highest(lesson.features.entropy, rho))
        rewards = torch.tensor([lesson.reward for lesson in rewarded], dtype=torch.float64)
        return cls(joined(parts), len(paired), rewards, torch.cat(counts))


def highest(value_T: Tensor, share: float) -> Tensor:
    """(T,) bool: the largest values, a share of them and at least one; of equal ones the first."""
    chosen = value_T.argsort(descending=True, stable=True)[: max(math.ceil(share * len(value_T)), 1)]
    return torch.zeros_like(value_T, dtype=torch.bool).index_fill(0, chosen, True)


def refuse_no_reward(reward: float) -> None:
    """Raises UserError on a reward that is no number from -1 to 1."""
    if not -1 <= reward <= 1:
        raise UserError(f"`reward` is {reward}; give a number from -1 to 1")
