"""What every config is: plain values, checked, frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from moe_bias import plugins
from moe_bias.limits import (
    LARGEST_COUNT,
    LARGEST_NUMBER,
    LARGEST_SIZE,
    in_bytes,
)
from moe_bias.mistakes import UserError, first_mistake

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Python writes bytes that are no UTF-8 as lone surrogates."""
_PATHS = (Path, Path | None)


def not_empty(value: object) -> object:
    """For a path: Python takes an empty one for the current folder, where a shell's variable was not set."""
    if value == "":
        raise ValueError("it is empty; the current folder is '.'")
    return value


def each_once(values: list[Any]) -> list[Any]:
    """For a list: none of its values may stand there twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} stands there twice")
    return values


def _plain(value: object) -> object:
    """NumPy's whole numbers as Python's."""
    return value.__index__() if hasattr(value, "__index__") and not isinstance(value, bool) else value


WholeNumber = Annotated[StrictInt, BeforeValidator(_plain)]
"""A number that is whole by its type: True, 3.0 and '3' are none."""


class Config(BaseModel):
    """Base of all configs: frozen, reads nothing from outside, refuses names that it does not know.

    Raises UserError, a ValueError, in one sentence that names the field and the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(describe(error, type(self))) from error

    def texts(self) -> list[str]:
        """Every text in the config: all that may be a path."""
        return list(_texts(dict(self)))

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_empty_path(cls, value: object, info: ValidationInfo) -> object:
        """Of a path; other texts may be empty."""
        return not_empty(value) if cls.model_fields[str(info.field_name)].annotation in _PATHS else value

    @field_validator("*", mode="before")
    @classmethod
    def _is_text_of_utf8(cls, value: object) -> object:
        """Refuses what no file, tokenizer or record could take."""
        if any(_UNWRITABLE.search(text) for text in _texts(value)):
            raise ValueError("it has a zero byte in it, or is not UTF-8")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _is_countable(cls, value: object) -> object:
        """Numbers beyond 64 bits, and those of work that would never end, fail somewhere deep within."""
        for number in _numbers(value):
            if isinstance(number, ByteSize):
                if not 0 <= number <= LARGEST_SIZE:
                    raise ValueError(f"a size is from 0 to {in_bytes(LARGEST_SIZE)}")
            elif isinstance(number, int) and abs(number) > LARGEST_COUNT:
                raise ValueError(f"at most {LARGEST_COUNT:,} can be counted to")
            elif isinstance(number, float) and abs(number) > LARGEST_NUMBER:
                raise ValueError(f"at most {LARGEST_NUMBER:g} can be computed with")
        return value


def _texts(value: object) -> Iterator[str]:
    """Every text in a value, lists and mappings of them included."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            if type(part) is not int:  # a support has thousands of them
                yield from _texts(part)


def _numbers(value: object) -> Iterator[float]:
    """Every number in a value, lists and mappings of them included."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        yield from _numbers([*value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            if type(part) is int:  # a support has thousands of them
                yield part
            else:
                yield from _numbers(part)


_CALLED_ELSEWHERE = {
    "lr": "expert_rate",
    "learning_rate": "expert_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "num_generations": "group",
    "rank": "expert_rank",
    "r": "expert_rank",
    "lr_scheduler_type": "decay",
    "warmup_ratio": "warmup",
}
"""Fields by what transformers, TRL and PEFT call them."""


def describe(error: ValidationError, config: type[BaseModel]) -> str:
    """One sentence on the first thing that is wrong with values for a config, naming field and value."""
    first = first_mistake(error)
    if not first.place:
        return first.reason
    name = first.place[0]
    if first.kind == "missing":
        return f"{name} is required"
    if first.kind == "extra_forbidden":
        known = _CALLED_ELSEWHERE.get(name)
        if known in config.model_fields:
            return f"{config.__name__} has no {name!r}; here it is {known!r}"
        return f"{config.__name__} has no {name!r}{nearest(name, config.model_fields)}"
    return first.of(name)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on an unknown name: the known one that is nearest to it, or all of them."""
    known = sorted(known)
    near = plugins.nearest(name, known)
    return f"; the nearest is {near!r}" if near else f"; there are {', '.join(known)}"
