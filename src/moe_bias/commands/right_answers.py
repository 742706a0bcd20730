"""The right answers of an evaluation as texts to train on: rejection sampling.

Each comes with the very prompt that it was sampled from. All answers to a problem are on one side of the
split: a problem is held out with all of them, or with none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_bias.api.data import Texts
from moe_bias.commands.eval_arms import BASE
from moe_bias.commands.evaluate import RECORD_FILE
from moe_bias.evaluation.samples import FILE, PROMPTS_FILE, Sample, SampleFile, read_prompts
from moe_bias.mistakes import UserError, read_json
from moe_bias.tasks.conversations import ask


@dataclass(frozen=True)
class RightAnswers:
    """Different right answers of one arm, in the order of the problems.

    `problems` are those of the evaluation, as its record has them; `sampled` counts the arm's samples, `cut` the
    right ones that the limit cut, which are left out: where they would have ended is not known.
    """

    folder: Path
    arm: str
    problems: dict[str, Any]
    texts: Texts
    sampled: int
    cut: int

    @classmethod
    def of(cls, folder: Path, arm: str | None) -> RightAnswers:
        """Those of the arm of this name, of the model without an adapter for None.

        Raises UserError where the folder is none of a finished `eval`, has no such arm, or no right answer of it.
        """
        record, prompts = _record(folder), _prompts(folder)
        samples = _of_arm(folder, arm or BASE)
        right = [sample for sample in samples if sample.is_correct]
        kept = _different(sample for sample in right if sample.finished)
        found = cls(
            folder,
            arm or BASE,
            record["problems"],
            _texts(kept, prompts, f"the right answers of {arm or BASE!r} in {folder}", record["protocol"]["chat"]),
            len(samples),
            sum(not sample.finished for sample in right),
        )
        if not kept:
            raise UserError(
                f"nothing to train on: {found.summary()}; sample more of each problem, or name another row "
                "with --samples-of"
            )
        return found

    def summary(self) -> str:
        """How many there are, and of how many samples and problems."""
        cut = f", without {self.cut} more that the token limit cut" if self.cut else ""
        return (
            f"{len(self.texts.conversations):,} different right answers to {len(set(self.texts.units)):,} of "
            f"{self.problems['count']:,} problems of {self.problems['name']}, among {self.sampled:,} samples of "
            f"{self.arm!r} in {self.folder}{cut}"
        )

    def record(self) -> dict[str, Any]:
        """What a record says of them: a figure on these problems is none on unseen ones."""
        return {
            "arm": self.arm,
            "problems": self.problems,
            "problems_answered": len(set(self.texts.units)),
            "answers": len(self.texts.conversations),
            "sampled": self.sampled,
            "cut": self.cut,
        }


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    record = read_json(path, "record") if path.is_file() else {}
    if not isinstance(record, dict) or not {"problems", "protocol"} <= record.keys():
        raise UserError(
            f"--samples {str(folder)!r} is not the folder of a finished moe-bias eval, which alone keeps every sample "
            "with its verdict; give its --output"
        )
    return dict(record)


def _prompts(folder: Path) -> dict[str, str]:
    if not (folder / PROMPTS_FILE).is_file():
        raise UserError(
            f"--samples {str(folder)!r} has no {PROMPTS_FILE}: it was measured before prompts were kept; give its "
            "command again, which writes them down and samples nothing anew"
        )
    return read_prompts(folder)


def _of_arm(folder: Path, arm: str) -> list[Sample]:
    names: set[str] = set()
    found: list[Sample] = []
    for sample in SampleFile(folder, 1).read():
        names.add(sample.arm)
        if sample.arm == arm:
            found.append(sample)
    if not found:
        listed = ", ".join(map(repr, sorted(names)))
        raise UserError(f"{str(folder / FILE)!r} has no samples of {arm!r}; name one with --samples-of: {listed}")
    return found


def _different(samples: Iterable[Sample]) -> list[Sample]:
    """Each text of a problem once."""
    found: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        found.setdefault((sample.problem, sample.text), sample)
    return list(found.values())


def _texts(samples: Iterable[Sample], prompts: dict[str, str], source: str, chat: bool) -> Texts:
    """In an order that does not depend on the batches in which they were sampled."""
    place = {problem: number for number, problem in enumerate(prompts)}
    ordered = sorted(samples, key=lambda sample: (place[sample.problem], sample.number))
    return Texts(
        [replace(ask(prompts[sample.problem], sample.text, chat), is_sampled=True) for sample in ordered],
        source,
        [place[sample.problem] for sample in ordered],
        "problems with right answers",
    )
