"""What a run's samples say of each arm: accuracy, pass@k, majority vote, lengths, loops, and paired changes.

With n samples of a problem, c of them correct:

    avg@n    c / n
    pass@k   1 - C(n - c, k) / C(n, k), unbiased for the chance that one of k is correct (arXiv 2107.03374)
    maj@n    whether the answer given most often is correct; of tied answers the share that is

    tokens   of a sample, end token included; also as a share of the first arm's, paired by problem

Each is averaged over problems, with a bootstrap interval over problems, as are the measures of how the answers
are written, which `repetition` defines; a change is the difference of two arms on the same problems, resampled
in pairs. `equal_tokens` says what accuracy is under every limit of tokens. Answers are the same where their text is,
spaces left out; a sample in which no answer could be read votes for none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import comb

import numpy as np

from moe_bias.evaluation.equal_tokens import AtLimit, at_limits, limits_of
from moe_bias.evaluation.repetition import repetition_of
from moe_bias.evaluation.samples import Sample
from moe_bias.evaluation.statistics import Estimate, Floats, mean, ratio_of_sums, share
from moe_bias.tasks.verdict import Outcome

GROUPS = ("level", "subject")
"""The columns that accuracy is given apart by, where the problems have them."""
TOKENS, CUT, LOOPING, DISTINCT = "tokens", "cut", "looping", "distinct"
PASS = "pass@"
"""Followed by k."""
_FAILURES: tuple[Outcome, ...] = ("unparseable", "timed out", "bad gold")


@dataclass(frozen=True)
class GroupScore:
    """Accuracy on the problems of one level or subject."""

    problems: int
    accuracy: Estimate


@dataclass(frozen=True)
class Score:
    """An arm on all problems; `pass_at` has k as text, as JSON will.

    `tokens` is the mean length of a sample and None where a server did not tell. `cut`, and the outcomes
    in `failures`, are shares of the samples. `looping` is the share of the samples that end in a loop, `distinct`
    their mean distinct-4. `groups` has, by column and value, those of two problems or more. `change` is that of
    the accuracy to each other arm before it; `changes` has the same of the other quantities, by their names, pass@k
    among them. `token_share` is the arm's tokens over the first arm's, `at_limits` accuracy at equal tokens. Both are
    None where not all lengths are known, the former for the first arm too.
    """

    name: str
    accuracy: Estimate
    pass_at: dict[str, Estimate]
    majority: Estimate | None
    tokens: Estimate | None
    sampled_tokens: int | None
    cut: float
    looping: Estimate
    distinct: Estimate
    failures: dict[str, float]
    groups: dict[str, dict[str, GroupScore]]
    change: dict[str, Estimate]
    changes: dict[str, dict[str, Estimate]]
    token_share: Estimate | None
    at_limits: list[AtLimit] | None


@dataclass
class _Seen:
    """What is kept of an arm's samples, by problem: themselves without their texts, and what was read in these."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    looping: dict[str, list[bool]] = field(default_factory=dict)
    distinct: dict[str, list[float]] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Reads the sample's text and lets go of it."""
        found = repetition_of(sample.text)
        self.samples.setdefault(sample.problem, []).append(replace(sample, text=""))
        self.looping.setdefault(sample.problem, []).append(found.loops)
        self.distinct.setdefault(sample.problem, []).append(found.distinct)

    def put_in_order(self, problems: Sequence[str]) -> None:
        """As these problems are, in whatever order they were answered: intervals are drawn over them by place."""
        there = [name for name in problems if name in self.samples]
        self.samples = {name: self.samples[name] for name in there}
        self.looping = {name: self.looping[name] for name in there}
        self.distinct = {name: self.distinct[name] for name in there}

    @cached_property
    def accuracy(self) -> dict[str, float]:
        """avg@n by problem."""
        return _means({name: [sample.is_correct for sample in group] for name, group in self.samples.items()})

    @cached_property
    def writing(self) -> dict[str, dict[str, float]]:
        """How the answers are written, by quantity and problem; without lengths where not all are known."""
        cut = {name: [not sample.finished for sample in group] for name, group in self.samples.items()}
        found = {CUT: _means(cut), LOOPING: _means(self.looping), DISTINCT: _means(self.distinct)}
        lengths = {name: [sample.tokens for sample in group] for name, group in self.samples.items()}
        known = {name: [tokens for tokens in row if tokens is not None] for name, row in lengths.items()}
        return {TOKENS: _means(known), **found} if known == lengths else found

    @cached_property
    def passed(self) -> dict[str, dict[str, float]]:
        """By `pass@k` and problem, for each k that is told."""
        size = len(next(iter(self.samples.values())))
        counts = {name: sum(sample.is_correct for sample in group) for name, group in self.samples.items()}
        return {
            f"{PASS}{k}": {name: pass_at(count, size, k) for name, count in counts.items()} for k in _choices_of_k(size)
        }

    @cached_property
    def compared(self) -> dict[str, dict[str, float]]:
        """All that arms are compared by besides accuracy."""
        return self.writing | self.passed


def scores(
    samples: Iterable[Sample],
    arms: Sequence[str],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    problems: Sequence[str] | None = None,
) -> list[Score]:
    """A score of each arm, in order. `groups` has the problems' ids by column and value.

    `problems` are all ids in their order (None: the order in which they were answered).
    """
    seen = {arm: _Seen() for arm in arms}
    for sample in samples:
        if sample.arm in seen:
            seen[sample.arm].add(sample)
    for each in seen.values() if problems is not None else ():
        each.put_in_order(problems or ())
    limits = limits_of([seen[arm].samples for arm in arms])
    return [
        _score(arm, seen[arm], {other: seen[other] for other in arms[:number]}, groups, limits)
        for number, arm in enumerate(arms)
    ]


def pass_at(correct: int, samples: int, k: int) -> float:
    """The chance that at least one of k of the samples, drawn without putting back, is correct."""
    return 1 - comb(samples - correct, k) / comb(samples, k)


def majority(samples: Sequence[Sample]) -> float:
    """The chance that the answer given most often is correct, ties drawn by lot; 0 without any answer."""
    votes = Counter(_text(sample) for sample in samples if sample.outcome in ("correct", "wrong"))
    most = max(votes.values(), default=0)
    tied = {answer for answer, count in votes.items() if count == most}
    right = {_text(sample) for sample in samples if sample.is_correct}
    return len(tied & right) / len(tied) if tied else 0.0


def _text(sample: Sample) -> str:
    return "".join((sample.answer or "").split())


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean over the samples of each problem."""
    return {name: float(np.mean(row)) for name, row in values.items()}


def _changes(quantity: str, seen: _Seen, before: Mapping[str, _Seen]) -> dict[str, Estimate]:
    return {
        name: _change(seen.compared[quantity], other.compared[quantity])
        for name, other in before.items()
        if quantity in other.compared
    }


def _change(of: Mapping[str, float], against: Mapping[str, float]) -> Estimate:
    return mean(np.array([of[name] - against[name] for name in of]))


def _token_share(seen: _Seen, before: Sequence[_Seen]) -> Estimate | None:
    """Tokens over the first arm's, resampled by problem."""
    if not before or not (TOKENS in seen.writing and TOKENS in before[0].writing):
        return None
    own, first = seen.writing[TOKENS], before[0].writing[TOKENS]
    return ratio_of_sums(_values(own), np.array([first[name] for name in own]))


def _score(
    arm: str,
    seen: _Seen,
    before: Mapping[str, _Seen],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    limits: Sequence[int],
) -> Score:
    problems, writing, others = seen.samples, seen.writing, list(before.values())
    every = [sample for group in problems.values() for sample in group]
    size = len(every) // len(problems)
    known = [sample.tokens for sample in every if sample.tokens is not None]
    return Score(
        name=arm,
        accuracy=share(_values(seen.accuracy)),
        pass_at={name.removeprefix(PASS): share(_values(passed)) for name, passed in seen.passed.items()},
        majority=share(np.array([majority(group) for group in problems.values()])) if size > 1 else None,
        tokens=mean(_values(writing[TOKENS])) if TOKENS in writing else None,
        sampled_tokens=sum(known) if TOKENS in writing else None,
        cut=float(np.mean([not sample.finished for sample in every])),
        looping=share(_values(writing[LOOPING])),
        distinct=mean(_values(writing[DISTINCT])),
        failures={name: float(np.mean([sample.outcome == name for sample in every])) for name in _FAILURES},
        groups={column: _by_value(seen.accuracy, values) for column, values in groups.items()},
        change={name: _change(seen.accuracy, other.accuracy) for name, other in before.items()},
        changes={quantity: _changes(quantity, seen, before) for quantity in seen.compared},
        token_share=_token_share(seen, others),
        at_limits=at_limits(problems, others[0].samples if others else None, limits) if limits else None,
    )


def _values(means: Mapping[str, float]) -> Floats:
    return np.array(list(means.values()))


def _choices_of_k(samples: int) -> list[int]:
    """Powers of two from 2, and all samples; k = 1 is the accuracy."""
    powers = [2**power for power in range(1, samples.bit_length()) if 2**power < samples]
    return [*powers, samples] if samples > 1 else []


def _by_value(accuracies: Mapping[str, float], values: Mapping[str, Sequence[str]]) -> dict[str, GroupScore]:
    return {
        value: GroupScore(len(names), share(np.array([accuracies[name] for name in names])))
        for value, names in sorted(values.items())
        if len(names) > 1
    }
