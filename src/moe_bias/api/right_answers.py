"""The right answers of an evaluation as texts to train on: rejection sampling.

Each comes with the very prompt that it was sampled from. All answers to a problem are on one side of the
split: a problem is held out with all of them, or with none. Which of a problem's right answers are taken:

    all         each different one
    shortest    the one of fewest tokens; of equally short ones the first
    shorter     those that are no longer than the median of its right answers

All three leave the problems as they are: only length is chosen, and only among answers that are right. A problem with
one right answer gives that one, whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

from moe_bias.api.arguments import named
from moe_bias.api.data import HasTexts, Texts
from moe_bias.api.reports import Evaluation
from moe_bias.config import Take
from moe_bias.evaluation.samples import (
    BASE,
    INSTRUCTED,
    PROMPTS_FILE,
    RECORD_FILE,
    Sample,
    SampleFile,
    read_prompts,
)
from moe_bias.mistakes import UserError, read_json
from moe_bias.tasks.benchmarks import instructed
from moe_bias.tasks.conversations import ask


def right_answers(samples: Evaluation | str | Path, samples_of: str = BASE, samples_take: Take = "all") -> RightAnswers:
    """The right answers of an evaluation, which `extract` takes as rows: rejection sampling.

    `samples` is what `evaluate` returned, or the folder of a finished `moe-bias eval`; `samples_of` is whose answers
    those are, by the name in the evaluation. `samples_take` says which of a problem's right answers are learned: 'all'
    that differ, the 'shortest', or the 'shorter' ones, which are no longer than their median. Answers that the token
    limit cut are left out. Raises UserError where there is nothing to train on, or lengths are needed that a server
    did not tell.
    """
    if samples_take not in get_args(Take):
        raise UserError(f"`samples_take` is {named(samples_take)}; give one of {', '.join(map(repr, get_args(Take)))}")
    if isinstance(samples, Evaluation):
        problems = {"name": samples.problems, "count": samples.count}
        asked = Asked("the evaluation", problems, samples.prompts, samples.chat, samples.instruction)
        return RightAnswers.of(asked, samples.samples, samples_of, samples_take)
    if not isinstance(samples, str | Path):
        raise UserError(f"`samples` is {named(samples)}; give what evaluate returned, or the folder of a moe-bias eval")
    return RightAnswers.of_folder(Path(samples), samples_of, samples_take)


@dataclass(frozen=True)
class Asked:
    """What was asked in an evaluation: its problems as a record has them, and their prompts by id.

    `instruction` stood below the prompts of the row of that name.
    """

    where: str
    problems: Mapping[str, Any]
    prompts: Mapping[str, str]
    chat: bool
    instruction: str = ""


@dataclass(frozen=True)
class RightAnswers(HasTexts):
    """Different right answers of one arm, in the order of the problems.

    `texts` are those taken, `asked` the problems of the evaluation; `sampled` counts the arm's samples, `cut` the
    right ones that the limit cut, which are left out: where they would have ended is not known. `tokens` is the mean
    length of the answers taken and of all right ones, each first averaged over those of a problem; None where a server
    did not tell.
    """

    asked: Asked
    arm: str
    take: Take
    texts: Texts
    sampled: int
    cut: int
    tokens: tuple[float, float] | None

    @classmethod
    def of_folder(cls, folder: Path, arm: str, take: Take = "all") -> RightAnswers:
        """Those of the arm of this name in the folder of an `eval`.

        Raises UserError where the folder is none of a finished `eval`, has no such arm, or no right answer of it.
        """
        record, prompts = _record(folder), _prompts(folder)
        told = next((one["instruction"] for one in record["arms"] if one.get("instruction")), "")
        asked = Asked(str(folder), record["problems"], prompts, record["protocol"]["chat"], told)
        return cls.of(asked, SampleFile(folder, 1).read(), arm, take)

    @classmethod
    def of(cls, asked: Asked, samples: Iterable[Sample], arm: str, take: Take) -> RightAnswers:
        """Those among the samples. Raises UserError where the arm has none, or no right ones."""
        own = _of_arm(asked, samples, arm)
        right = [sample for sample in own if sample.is_correct]
        different = _different(sample for sample in right if sample.finished)
        taken = [sample for group in different.values() for sample in _taken(group, take, asked)]
        found = cls(
            asked,
            arm,
            take,
            _texts(taken, asked, f"the right answers of {arm!r} in {asked.where}", arm),
            len(own),
            sum(not sample.finished for sample in right),
            _mean_tokens(different, taken),
        )
        if not taken:
            raise UserError(
                f"nothing to train on: {found.summary()}; sample more of each problem, or name another row with "
                "`samples_of`"
            )
        return found

    def summary(self) -> str:
        """How many there are, and of how many samples and problems."""
        cut = f", without {self.cut} more that the token limit cut" if self.cut else ""
        which = "different right answers" if self.take == "all" else f"right answers, the {self.take} of each problem,"
        long = ""
        if self.take != "all" and self.tokens is not None:
            long = f"; they have {self.tokens[0]:,.0f} tokens on average, all right answers {self.tokens[1]:,.0f}"
        return (
            f"{len(self.texts.conversations):,} {which} to {len(set(self.texts.units)):,} of "
            f"{self.asked.problems['count']:,} problems of {self.asked.problems['name']}, among {self.sampled:,} "
            f"samples of {self.arm!r} in {self.asked.where}{cut}{long}"
        )

    def record(self) -> dict[str, Any]:
        """What a record says of them: a figure on these problems is none on unseen ones."""
        return {
            "arm": self.arm,
            "problems": self.asked.problems,
            "problems_answered": len(set(self.texts.units)),
            "answers": len(self.texts.conversations),
            "sampled": self.sampled,
            "cut": self.cut,
            "take": self.take,
            "tokens": None if self.tokens is None else {"taken": self.tokens[0], "right": self.tokens[1]},
        }


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    record = read_json(path, "record") if path.is_file() else {}
    if not isinstance(record, dict) or not {"problems", "protocol", "arms"} <= record.keys():
        raise UserError(
            f"`samples` {str(folder)!r} is not the folder of a finished moe-bias eval, which alone keeps every sample "
            "with its verdict; give its `output`"
        )
    return dict(record)


def _prompts(folder: Path) -> dict[str, str]:
    if not (folder / PROMPTS_FILE).is_file():
        raise UserError(
            f"`samples` {str(folder)!r} has no {PROMPTS_FILE}: it was measured before prompts were kept; "
            "evaluating into it again writes them down and samples nothing anew"
        )
    return read_prompts(folder)


def _of_arm(asked: Asked, samples: Iterable[Sample], arm: str) -> list[Sample]:
    names: set[str] = set()
    found: list[Sample] = []
    for sample in samples:
        names.add(sample.arm)
        if sample.arm == arm:
            found.append(sample)
    if not found:
        listed = ", ".join(map(repr, sorted(names)))
        raise UserError(f"{asked.where!r} has no samples of {arm!r}; name one with `samples_of`: {listed}")
    return found


def _different(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Each text of a problem once, by problem, in the order of the samples' numbers."""
    found: dict[str, dict[str, Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.number):
        found.setdefault(sample.problem, {}).setdefault(sample.text, sample)
    return {problem: list(texts.values()) for problem, texts in found.items()}


def _taken(group: Sequence[Sample], take: Take, asked: Asked) -> list[Sample]:
    """Of the right answers to one problem those that are learned."""
    if take == "all":
        return list(group)
    lengths = [_length(sample, take, asked) for sample in group]
    if take == "shortest":
        return [group[lengths.index(min(lengths))]]
    return [sample for sample, length in zip(group, lengths, strict=True) if length <= median(lengths)]


def _length(sample: Sample, take: Take, asked: Asked) -> int:
    if sample.tokens is None:
        raise UserError(
            f"`samples_take` {take!r} needs to know how long answers are, which the server that {asked.where!r} was "
            "sampled from did not tell; take 'all', or sample with transformers"
        )
    return sample.tokens


def _mean_tokens(right: Mapping[str, Sequence[Sample]], taken: Sequence[Sample]) -> tuple[float, float] | None:
    """Over problems, of means over a problem's answers: those taken, and all right ones."""
    if not taken or any(sample.tokens is None for group in right.values() for sample in group):
        return None
    of_taken: dict[str, list[int]] = {}
    for sample in taken:
        of_taken.setdefault(sample.problem, []).append(sample.tokens or 0)
    of_right = {problem: [sample.tokens or 0 for sample in group] for problem, group in right.items()}
    return fmean(map(fmean, of_taken.values())), fmean(map(fmean, of_right.values()))


def _texts(samples: Iterable[Sample], asked: Asked, source: str, arm: str) -> Texts:
    """In an order that does not depend on the batches in which they were sampled."""
    place = {problem: number for number, problem in enumerate(asked.prompts)}
    ordered = sorted(samples, key=lambda sample: (place[sample.problem], sample.number))
    told = asked.instruction if arm == INSTRUCTED else ""
    prompts = {problem: instructed(prompt, told) for problem, prompt in asked.prompts.items()}
    return Texts(
        [replace(ask(prompts[sample.problem], sample.text, asked.chat), is_sampled=True) for sample in ordered],
        source,
        [place[sample.problem] for sample in ordered],
        "problems with right answers",
    )
