"""The grid of a sweep: settings and their values as text, and the settings of each cell.

`num_experts=4,16 expert_rate=2e-2,5e-2` is four cells, named `num_experts=4 expert_rate=2e-2` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TypeVar

from moe_bias.config import Config, SFTConfig
from moe_bias.mistakes import UserError

Changed = TypeVar("Changed", bound=Config)
_PER_SEED = "seed"


def parse_grid(text: str) -> list[dict[str, str]]:
    """The cells, the last setting varying fastest.

    Raises UserError on a word that is not `name=value,...`, on a name that is no setting of training
    or stands twice, and on a value that stands twice.
    """
    axes: dict[str, list[str]] = {}
    for word in text.split():
        name, values = _axis(word)
        if name in axes:
            raise UserError(f"`grid` has {name} twice; list all its values in one place")
        axes[name] = values
    if not axes:
        raise UserError("`grid` is empty; give at least one setting, such as 'num_experts=4,16'")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def cell_name(cell: Mapping[str, str]) -> str:
    """As it is typed and shown."""
    return " ".join(f"{name}={value}" for name, value in cell.items())


def find_cell(text: str, cells: list[dict[str, str]]) -> str:
    """The name of the cell that has all these values; the first one's for an empty text.

    Raises UserError where there is none, or more than one.
    """
    wanted = dict(word.partition("=")[::2] for word in text.split())
    found = [cell for cell in cells if wanted.items() <= cell.items()]
    if not found or (text and len(found) > 1):
        number = len(found) or "no"
        raise UserError(f"`base` {text!r} names {number} cells of the grid; name one, as {cell_name(cells[0])!r}")
    return cell_name(found[0])


def with_changes(settings: Changed, changes: Mapping[str, object]) -> Changed:
    """The settings with some of them changed, checked. Raises UserError on values that cannot be."""
    try:
        return type(settings)(**{**settings.model_dump(exclude_unset=True), **changes})
    except UserError as error:
        raise UserError(f"with {', '.join(f'{name} = {value}' for name, value in changes.items())}: {error}") from error


def _axis(word: str) -> tuple[str, list[str]]:
    name, equals, values = word.partition("=")
    name, listed = name.replace("-", "_"), values.split(",")
    if not equals or not all(listed):
        raise UserError(f"`grid` has {word!r}; write it as name=value,value")
    if name == _PER_SEED:
        raise UserError("`grid` has seed; every cell is run with each of `seeds`")
    if name not in SFTConfig.model_fields:
        raise UserError(f"`grid` has {name!r}, which is none of {', '.join(sorted(SFTConfig.model_fields))}")
    if len(set(listed)) < len(listed):
        raise UserError(f"`grid` has {word!r}, in which a value stands twice")
    return name, listed
