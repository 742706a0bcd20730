"""What a run's samples say of each arm: accuracy, pass@k, majority vote, lengths, and paired changes.

With n samples of a problem, c of them correct:

    avg@n    c / n
    pass@k   1 - C(n - c, k) / C(n, k), unbiased for the chance that one of k is correct (arXiv 2107.03374)
    maj@n    whether the answer given most often is correct; of tied answers the share that is

Each is averaged over problems, with a bootstrap interval over problems; a change is the difference of
two arms' avg@n on the same problems, resampled in pairs. Answers are the same where their text is,
spaces left out; a sample in which no answer could be read votes for none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np

from moe_bias.evaluation.samples import Sample
from moe_bias.evaluation.statistics import Estimate, Floats, mean, share
from moe_bias.tasks.verdict import Outcome

GROUPS = ("level", "subject")
"""The columns that accuracy is given apart by, where the problems have them."""
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
    in `failures`, are shares of the samples. `groups` has, by column and value, those of two problems or
    more. `change` is that to each other arm before it.
    """

    name: str
    accuracy: Estimate
    pass_at: dict[str, Estimate]
    majority: Estimate | None
    tokens: Estimate | None
    sampled_tokens: int | None
    cut: float
    failures: dict[str, float]
    groups: dict[str, dict[str, GroupScore]]
    change: dict[str, Estimate]


def scores(
    samples: Iterable[Sample], arms: Sequence[str], groups: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[Score]:
    """A score of each arm, in order. `groups` has the problems' ids by column and value."""
    found: dict[str, dict[str, list[Sample]]] = {arm: {} for arm in arms}
    for sample in samples:
        if sample.arm in found:
            found[sample.arm].setdefault(sample.problem, []).append(replace(sample, text=""))
    accuracies = {arm: _accuracies(problems) for arm, problems in found.items()}
    made: list[Score] = []
    for arm in arms:
        before = {score.name: _change(accuracies[arm], accuracies[score.name]) for score in made}
        made.append(_score(arm, found[arm], accuracies[arm], groups, before))
    return made


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


def _accuracies(problems: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """avg@n by problem."""
    return {name: float(np.mean([sample.is_correct for sample in group])) for name, group in problems.items()}


def _change(of: Mapping[str, float], against: Mapping[str, float]) -> Estimate:
    return mean(np.array([of[name] - against[name] for name in of]))


def _score(
    arm: str,
    problems: Mapping[str, Sequence[Sample]],
    accuracies: Mapping[str, float],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    change: dict[str, Estimate],
) -> Score:
    every = [sample for group in problems.values() for sample in group]
    size = len(every) // len(problems)
    lengths = [[sample.tokens for sample in group] for group in problems.values()]
    known = [[tokens for tokens in row if tokens is not None] for row in lengths]
    is_known = sum(map(len, known)) == len(every)
    return Score(
        name=arm,
        accuracy=share(np.array(list(accuracies.values()))),
        pass_at={str(k): share(_passed(problems, size, k)) for k in _choices_of_k(size)},
        majority=share(np.array([majority(group) for group in problems.values()])) if size > 1 else None,
        tokens=mean(np.array([np.mean(row) for row in known])) if is_known else None,
        sampled_tokens=sum(map(sum, known)) if is_known else None,
        cut=float(np.mean([not sample.finished for sample in every])),
        failures={name: float(np.mean([sample.outcome == name for sample in every])) for name in _FAILURES},
        groups={column: _by_value(accuracies, values) for column, values in groups.items()},
        change=change,
    )


def _passed(problems: Mapping[str, Sequence[Sample]], size: int, k: int) -> Floats:
    counts = [sum(sample.is_correct for sample in group) for group in problems.values()]
    return np.array([pass_at(count, size, k) for count in counts])


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
