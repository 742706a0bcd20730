"""What is measured on: benchmarks by name, data sets of one's own, and tasks; and how they are asked.

A protocol says all that decides a sample besides the model: samples of each problem, temperature,
top-p, token limit, prompt template, seed. What is not given is the benchmark's own, after arXiv
2506.01939: 16 samples at temperature 1 for AIME and AMC. A data set or task of one's own is answered
once, greedily.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from moe_bias.config import EvalConfig
from moe_bias.mistakes import UserError
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.mathematics import INSTRUCTION, Columns, data_task
from moe_bias.tasks.task import Problem, Task

PLACE = "{question}"
TASK_PROBLEMS = 200
_ID_COLUMNS = ("id", "unique_id")


@dataclass(frozen=True)
class Benchmark:
    """A data set of the Hub, and the protocol that it is usually measured by."""

    source: str
    split: str
    samples: int
    temperature: float
    max_new_tokens: int
    configuration: str | None = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", 16, 1.0, 20480),
    "aime25": Benchmark("math-ai/aime25", "test", 16, 1.0, 20480),
    "amc23": Benchmark("math-ai/amc23", "test", 16, 1.0, 20480),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", 4, 1.0, 20480),
    "gsm8k": Benchmark("openai/gsm8k", "test", 1, 0.0, 1024, "main"),
}
_OWN = Benchmark("", "", 1, 0.0, 1024)
"""The protocol of data sets and tasks that have none."""


@dataclass(frozen=True)
class Protocol:
    """How problems are asked, in the names of the options that set it."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    prompt_template: str
    chat: bool
    seed: int

    def prompt(self, problem: Problem, instruction: str = "") -> str:
        """The user's turn, or without a chat the text to go on with; an instruction stands below it."""
        return instructed(self.prompt_template.replace(PLACE, problem.question), instruction)

    def seed_of(self, problem: Problem) -> int:
        """Of a problem's samples, from 0 to 2^31: from its text, so that other problems beside it change nothing."""
        text = json.dumps([self.seed, problem.question])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class ProblemSet:
    """The problems that a run measures on, their ids in samples and records, and the task that verifies them."""

    name: str
    task: Task
    problems: Sequence[Problem]
    ids: Sequence[str]

    def digest(self) -> str:
        """SHA-256 of ids and questions; gold answers are left out, so that they can be mended and graded again."""
        text = json.dumps([[name, problem.question] for name, problem in zip(self.ids, self.problems, strict=True)])
        return hashlib.sha256(text.encode()).hexdigest()


def instructed(prompt: str, instruction: str) -> str:
    """The prompt with an instruction below it, where there is one."""
    return f"{prompt}\n\n{instruction}" if instruction else prompt


def protocol_of(settings: EvalConfig) -> Protocol:
    """The settings, and the benchmark's own values where they say nothing.

    Raises UserError on a prompt template without a place for the question, and on several greedy samples.
    """
    own = find_benchmark(settings.benchmark) if settings.benchmark else _OWN
    temperature = own.temperature if settings.temperature is None else settings.temperature
    samples = settings.samples or (own.samples if temperature > 0 else 1)
    if samples > 1 and temperature == 0:
        raise UserError(f"`samples` {samples} at temperature 0 would be all alike; give a `temperature`, such as 1")
    return Protocol(
        samples=samples,
        temperature=temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens or own.max_new_tokens,
        prompt_template=_template(settings),
        chat=settings.chat,
        seed=settings.seed,
    )


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name. Raises UserError with the near names where there is none."""
    if name not in BENCHMARKS:
        near = get_close_matches(name.lower(), BENCHMARKS, n=2, cutoff=0.0)
        raise UserError(
            f"there is no benchmark {name!r}; near names are {' and '.join(near)}, of {', '.join(BENCHMARKS)}; "
            "a file or another data set of the Hub is given as `data`"
        )
    return BENCHMARKS[name]


def problem_set(settings: EvalConfig) -> ProblemSet:
    """The problems that the settings name, drawn by the seed where they are limited.

    Raises UserError on a source that cannot be read, a problem without a gold answer, and too few problems.
    """
    if settings.task:
        return drawn_from(make_task(settings.task, settings.task_options, settings.easy), settings)
    if settings.benchmark:
        named = find_benchmark(settings.benchmark)
        task = data_task(named.source, named.split, instruction="", configuration=named.configuration)
    else:
        columns = Columns(settings.question_column, settings.gold_column)
        task = data_task(settings.data, settings.split, columns, instruction="")
    problems = task.problems(settings.limit, settings.seed) if settings.limit else task.all_problems
    found = _numbered(settings.benchmark or settings.data, task, problems)
    for name, problem in zip(found.ids, found.problems, strict=True):
        if not problem.gold:
            raise UserError(f"problem {name!r} of {found.name} has an empty gold answer; fill it in or leave it out")
    return found


def drawn_from(task: Task, settings: EvalConfig) -> ProblemSet:
    """The task's problems after those that training with this seed takes."""
    wanted = settings.train_problems + (settings.limit or TASK_PROBLEMS)
    return _numbered(task.name, task, task.problems(wanted, settings.seed)[settings.train_problems :])


def _numbered(name: str, task: Task, problems: Sequence[Problem]) -> ProblemSet:
    """Raises UserError on fewer than two problems, of which no interval can be given."""
    if len(problems) < 2:
        raise UserError(f"{name} has {len(problems)} problem; an interval needs at least 2")
    return ProblemSet(name, task, problems, _ids([problem.entry for problem in problems]))


def _ids(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first column of ids in which every problem has its own, else numbers from 1."""
    for column in _ID_COLUMNS:
        found = [str(entry.get(column)) for entry in entries]
        if len(set(found)) == len(found):
            return found
    return [str(number) for number in range(1, len(entries) + 1)]


def _template(settings: EvalConfig) -> str:
    """Tasks say themselves what form the answer is to have."""
    says_itself = not (settings.benchmark or settings.data)
    usual = PLACE if says_itself else f"{PLACE}\n\n{INSTRUCTION}"
    template = settings.prompt_template or usual
    if PLACE not in template:
        raise UserError(f"`prompt_template` {template!r} has no {PLACE}, the place for the question; put it in")
    return template
