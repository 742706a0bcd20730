"""Which model, which problems, and how they are answered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moe_bias.config.base import Config
from moe_bias.limits import (
    LONGEST_ANSWER,
    in_bytes,
    in_short,
    machine_bytes,
)

BUNDLED_MODEL = "bundled"
BYTES_OF_A_PROBLEM = 1024
"""About what a problem takes, its question and its prompt."""


def _whole_or_word(value: object) -> object:
    """A word that is a whole number as Python writes it, as that number."""
    return int(value) if isinstance(value, str) and re.fullmatch("0|-?[1-9][0-9]{0,18}", value) else value


TaskOption = Annotated[JsonValue, BeforeValidator(_whole_or_word)]
"""Of what type it is to be, the task says (`tasks.options`); of the command line all but whole numbers are words."""


class ModelConfig(Config):
    """Which model, where and in which precision."""

    model: str = Field(BUNDLED_MODEL, description="Hub id, folder, GGUF file, or 'bundled' (SmolLM2-135M-Instruct)")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1'")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights' type")
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


class TaskConfig(Config):
    """Problems whose answers a program can check."""

    task: str = Field("products", description="a task's name, as moe-bias tasks lists them, or module:name")
    task_options: dict[str, TaskOption] = Field({}, description="options of the task, such as max_terms=3")
    easy: bool = Field(True, description="options that suit models of 135M parameters, where the task has such")
    problems: str = Field("", description="JSON Lines file or Hub data set of problems and answers, in place of a task")
    split: str = Field("train", description="split of a Hub data set")
    question_column: str = Field("", description="column of the questions in the problems; none: its usual names")
    gold_column: str = Field("", description="column of the gold answers, such as reward_model.ground_truth")
    train_problems: int = Field(600, ge=2, description="problems to train on")
    test_problems: int = Field(200, ge=2, description="held-out problems to measure on")

    @model_validator(mode="after")
    def _problems_fit(self) -> Self:
        """Errors' contexts name the fields, so that a command can say where they came from."""
        counts = {"train_problems": self.train_problems, "test_problems": self.test_problems}
        _refuse_problems_beyond_memory(counts)
        return self


def _refuse_problems_beyond_memory(counts: Mapping[str, int]) -> None:
    needed, there = BYTES_OF_A_PROBLEM * sum(counts.values()), machine_bytes()
    if there is not None and needed > there:
        raise PydanticCustomError(
            "memory",
            "{count} problems would take {needed} and this machine has {there}; ask for fewer",
            {"count": in_short(sum(counts.values())), "needed": in_bytes(needed), "there": in_bytes(there), **counts},
        )


class EvalConfig(Config):
    """What a model and its adapters are measured on, and how their answers are sampled."""

    benchmark: str = Field("", description="'aime24', 'aime25', 'amc23', 'math500' or 'gsm8k', from the Hub")
    data: str = Field("", description="JSON Lines file or Hub data set of questions and gold answers")
    split: str = Field("test", description="split of a Hub data set given as data")
    question_column: str = Field("", description="column of the questions in the data; none: its usual names")
    gold_column: str = Field("", description="column of the gold answers, such as reward_model.ground_truth")
    task: str = Field("", description="a task's name, as moe-bias tasks lists them, or module:name")
    task_options: dict[str, TaskOption] = Field({}, description="options of the task, such as max_terms=3")
    easy: bool = Field(True, description="options that suit models of 135M parameters, where the task has such")
    train_problems: int = Field(
        600, ge=0, description="problems of a task to leave out first: those that a run with this seed trains on"
    )
    limit: int | None = Field(
        None, ge=2, description="so many problems, drawn with the seed; none: all of them, and 200 of a task"
    )
    samples: int | None = Field(None, ge=1, description="samples of each problem; none: as usual for the benchmark")
    temperature: float | None = Field(None, ge=0, description="0 is greedy; none: as usual for the benchmark")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the fewest tokens that hold this probability")
    max_new_tokens: int | None = Field(
        None, ge=1, le=LONGEST_ANSWER, description="token limit; none: as usual for the benchmark"
    )
    prompt_template: str = Field(
        "", description="user's turn with {question} in it; none: asks for the answer in a box where a task does not"
    )
    instruction: str = Field(
        "", description="ask the model without an adapter once more, with this below each prompt: the row 'instructed'"
    )
    chat: bool = Field(True, description="put the prompt into the chat template")
    seed: int = Field(0, ge=0, description="seed of the samples, and of which problems are drawn")
    batch_size: int = Field(
        64, ge=1, description="answers in one forward pass, or asked for at a time; at least those of one problem"
    )

    @model_validator(mode="after")
    def _problems_fit(self) -> Self:
        """Errors' contexts name the fields, so that a command can say where they came from."""
        given = {name: getattr(self, name) for name in ("benchmark", "data", "task") if getattr(self, name)}
        _refuse_problems_beyond_memory({"train_problems": self.train_problems, "limit": self.limit or 0})
        if len(given) > 1:
            both = " and ".join(f"`{name}` {{{name}}}" for name in given)
            raise PydanticCustomError("source", f"{both} exclude each other; give one", given)
        return self
