"""The `MOE_BIAS_*` variables of code that has no command line: the four-line use, and the plugin of vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ByteSize, Field, ValidationError

from moe_bias.config import Config, LayerOptions
from moe_bias.mistakes import UserError, first_mistake
from moe_bias.plugins import nearest

PREFIX = "MOE_BIAS_"
CONFIG = PREFIX + "CONFIG"
"""Names the settings file of the command line."""
CACHE = PREFIX + "CACHE"
"""Names the folder of what is kept between runs."""
NOTES = PREFIX + "NOTES"
"""What the processes of one vLLM tell each other; nobody sets it by hand."""
LEARNING = PREFIX + "LEARNING"
"""What a server of vLLM's is to learn by, as JSON; `moe-bias serve --learn` sets it."""
Values = TypeVar("Values", bound=Config)


class LayerVariables(LayerOptions):
    """The `MOE_BIAS_*` variables of the four-line use."""

    enabled: bool = Field(True, description="apply the layer at all")


class ServingVariables(Config):
    """The `MOE_BIAS_*` variables of the plugin of vLLM; without MOE_BIAS_ADAPTERS it does nothing."""

    adapters: Path | None = Field(None, description="folder of the adapters, one folder each")
    adapter_memory: ByteSize = Field(
        ByteSize(2**30), gt=0, description="memory that loaded adapters may take, such as 1GiB"
    )
    spool: Path | None = Field(
        None, description="folder of record files; without it nothing is kept of requests for training"
    )


def from_variables(kind: type[Values], values: Mapping[str, str] = os.environ) -> Values:
    """The values that variables give for a config's fields, and its defaults. Raises UserError naming the variable."""
    upper = {name.upper(): value for name, value in values.items()}
    given = {name: upper[variable(name)] for name in kind.model_fields if variable(name) in upper}
    try:
        return kind(**given)
    except UserError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        first = first_mistake(error.__cause__)
        raise UserError(first.of(variable(first.field)) if first.place else str(error)) from error


def refuse_unknown(options: Iterable[str], names: Iterable[str] = os.environ) -> None:
    """Raises UserError on a `MOE_BIAS_*` variable that nothing reads, neither as one of these options nor elsewhere."""
    fields = {*options, *LayerVariables.model_fields, *ServingVariables.model_fields}
    known = {variable(field) for field in fields} | {CONFIG, CACHE, NOTES, LEARNING}
    for name in sorted(names):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = nearest(name.upper().removeprefix(PREFIX), {each.removeprefix(PREFIX) for each in known})
            remedy = f"the nearest is {PREFIX}{near}" if near else "unset it"
            raise UserError(f"the variable {name} is none that moe-bias reads; {remedy}")


def variable(field: str) -> str:
    """The variable of a field."""
    return PREFIX + field.upper()
