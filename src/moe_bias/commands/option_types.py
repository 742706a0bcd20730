"""Options of several values, as they are written at a terminal."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic_settings import NoDecode

from moe_bias.config import Experts


def split_at_commas(value: object) -> object:
    """The parts of a text; anything else as it is."""
    return value.split(",") if isinstance(value, str) else value


def _listed(value: object) -> object:
    """One number, as a settings file may have it, is a list of one."""
    return [value] if isinstance(value, int) else split_at_commas(value)


PositiveInts = Annotated[list[PositiveInt], NoDecode, BeforeValidator(_listed), Field(min_length=1)]
"""A list of positive numbers; in a variable or an option it is written `1,4,16`."""
Seeds = Annotated[list[NonNegativeInt], NoDecode, BeforeValidator(split_at_commas), Field(min_length=1)]
"""A list of seeds, written `0,1,2`."""
Folders = Annotated[list[Annotated[str, Field(min_length=1)]] | None, NoDecode, BeforeValidator(split_at_commas)]
"""A list of folders, or None; in a variable or an option it is written `part-1,part-2`."""
Names = Annotated[list[Annotated[str, Field(min_length=1)]], NoDecode, BeforeValidator(split_at_commas)]
"""A list of names, written `static,moe-bias`."""
Kinds = Annotated[list[Experts], NoDecode, BeforeValidator(split_at_commas), Field(min_length=1)]
"""A list of kinds of experts, written `directions,linear`."""


def option(field: str) -> str:
    """A field as it is typed."""
    return "--" + field.replace("_", "-")
