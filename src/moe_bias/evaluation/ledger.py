"""Which arm has answered which problem, and with what verdict: answers are graded as they come, and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from moe_bias.evaluation.samples import Sample, SampleFile
from moe_bias.mistakes import SAME_CALL, UserError
from moe_bias.progress import Meter, meter
from moe_bias.rollout.decoding import TextAnswer
from moe_bias.tasks.benchmarks import ProblemSet
from moe_bias.tasks.verdict import Verdict

GRADED_CHARACTERS = 20_000
"""Only so much of an answer's end is graded: in 400,000, dollar signs alone keep a grader busy for 20 seconds."""
_GRADED_AT_ONCE = 64


@dataclass(frozen=True)
class Ledger:
    """The problems of a run, the names of its arms, and the file of their samples."""

    problems: ProblemSet
    arms: Sequence[str]
    file: SampleFile

    def missing(self) -> dict[str, list[int]]:
        """By arm the numbers of the problems that it has not answered; an arm that has answered all is left out."""
        answered = self.file.answered()
        found = {
            arm: [number for number, name in enumerate(self.problems.ids) if name not in answered.get(arm, set())]
            for arm in self.arms
        }
        return {arm: numbers for arm, numbers in found.items() if numbers}

    def kept(self) -> str:
        """How much there is, for a run that has to stop."""
        return f"{self._done()} are kept in {self.file.path}; {SAME_CALL} answers the others"

    def check_whole(self) -> None:
        """Raises UserError where answers are missing."""
        if self.missing():
            raise UserError(f"{self._done()} are in {self.file.path}; answer the others first, without `regrade`")

    def keep(self, number: int, answers: Mapping[str, Sequence[TextAnswer]]) -> None:
        """Grades the samples of a problem by arm, and adds them to the file."""
        every = [(arm, place, answer) for arm, group in answers.items() for place, answer in enumerate(group)]
        verdicts = self._verdicts([number] * len(every), [answer.text for _, _, answer in every])
        rows = zip(every, verdicts, strict=True)
        self.file.append([self._sample(number, *each, verdict) for each, verdict in rows])

    def regrade(self) -> None:
        """Grades every kept sample again."""
        total = sum(1 for _ in self.file.read())
        with meter("grading", total, "answers") as bar:
            self.file.rewrite(self._graded_again(bar))

    def _done(self) -> str:
        total = len(self.arms) * len(self.problems.ids)
        done = total - sum(map(len, self.missing().values()))
        arms = f" (of {len(self.arms)} arms together)" if len(self.arms) > 1 else ""
        return f"answers to {done} of {total} problems{arms}"

    def _graded_again(self, bar: Meter) -> Iterator[Sample]:
        place = {name: number for number, name in enumerate(self.problems.ids)}
        samples = self.file.read()
        while chunk := list(islice(samples, _GRADED_AT_ONCE)):
            verdicts = self._verdicts([place[sample.problem] for sample in chunk], [sample.text for sample in chunk])
            for sample, verdict in zip(chunk, verdicts, strict=True):
                yield replace(sample, outcome=verdict.outcome, answer=verdict.answer)
            bar.advance(len(chunk))

    def _verdicts(self, numbers: Sequence[int], texts: Sequence[str]) -> list[Verdict]:
        problems = [self.problems.problems[number] for number in numbers]
        return self.problems.task.verify(problems, [text[-GRADED_CHARACTERS:] for text in texts])

    def _sample(self, number: int, arm: str, place: int, answer: TextAnswer, verdict: Verdict) -> Sample:
        return Sample(
            problem=self.problems.ids[number],
            arm=arm,
            number=place,
            outcome=verdict.outcome,
            answer=verdict.answer,
            tokens=answer.tokens,
            finished=answer.finished,
            text=answer.text,
        )
