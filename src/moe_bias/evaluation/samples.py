"""Answers with their verdicts as a run keeps them: `samples.jsonl`, a line of JSON for each; and `problems.jsonl`,
which problems those were and how each was put to the arms.

The lines of a problem are added together, and a problem counts as answered by an arm when all its
lines are there: what a killed run left of a problem is dropped, and the problem answered again. Lines
are read one at a time, so that the file may be larger than memory.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_bias.mistakes import as_kind, damaged, reason_of
from moe_bias.records import write_parts
from moe_bias.tasks.verdict import Outcome

FILE = "samples.jsonl"
RECORD_FILE = "record.json"
"""What a finished run has beside them."""
BASE, INSTRUCTED = "base", "instructed"
"""The arms of the model without an adapter: as it is, and told more."""
PROMPTS_FILE = "problems.jsonl"
_REMEDY = "remove the line to have its problem answered again"


@dataclass(frozen=True)
class Sample:
    """One answer of an arm to a problem: `number` counts from 0, `tokens` None is unknown, `finished` False was cut."""

    problem: str
    arm: str
    number: int
    outcome: Outcome
    answer: str | None
    tokens: int | None
    finished: bool
    text: str

    @property
    def is_correct(self) -> bool:
        """Whether the outcome is `correct`."""
        return self.outcome == "correct"


class SampleFile:
    """The samples of a run in its folder, `samples` of each arm and problem."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.path = folder / FILE
        self._samples = samples

    def read(self) -> Iterator[Sample]:
        """Every whole line. Raises UserError on a damaged one; a last line without its end is left out."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                where = f"line {number} of {self.path}"
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise damaged(where, f"it is not JSON: {reason_of(error)}", _REMEDY) from error
                yield as_kind(Sample, found, where, _REMEDY)

    def answered(self) -> dict[str, set[str]]:
        """The problems that each arm has answered in full; lines of others are removed from the file."""
        counts = Counter((sample.arm, sample.problem) for sample in self.read())
        whole = {key for key, count in counts.items() if count == self._samples}
        if len(whole) < len(counts) or not self._ends_whole():
            self.rewrite(sample for sample in self.read() if (sample.arm, sample.problem) in whole)
        found: dict[str, set[str]] = {}
        for arm, problem in whole:
            found.setdefault(arm, set()).add(problem)
        return found

    def append(self, samples: Sequence[Sample]) -> None:
        """Adds all samples of a problem, which are on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join(map(_line, samples)))
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, samples: Iterable[Sample]) -> None:
        """Replaces the file whole; `samples` may come from `read`."""
        write_parts(self.path, map(_line, samples))

    def _ends_whole(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"


def write_prompts(folder: Path, prompts: Mapping[str, str]) -> None:
    """Keeps the user's turns by the problems' ids, in their order."""
    rows = ({"id": name, "prompt": prompt} for name, prompt in prompts.items())
    write_parts(folder / PROMPTS_FILE, (_as_line(row) for row in rows))


def read_prompts(folder: Path) -> dict[str, str]:
    """The user's turns by the problems' ids, in the problems' order."""
    with (folder / PROMPTS_FILE).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["id"]: row["prompt"] for row in rows}


def _line(sample: Sample) -> bytes:
    return _as_line(asdict(sample))


def _as_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()
