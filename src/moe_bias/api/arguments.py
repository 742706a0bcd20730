"""Arguments of another kind than a call takes: a name in place of a model, a layer of another model, two exchanged.

Each is told in one sentence that says what to give, before any work begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from moe_bias.config import Config
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError, shown

Settings = TypeVar("Settings", bound=Config)


def refuse_other_base(base: object) -> None:
    """Raises UserError where `base` is no frozen model."""
    if isinstance(base, Frozen):
        return
    if isinstance(base, str | Path):
        way = f"moe_bias.load({str(base)!r}) loads one by its name"
    elif isinstance(base, nn.Module):
        way = "moe_bias.Frozen(model, tokenizer) makes one of a model in memory"
    else:
        way = "give what moe_bias.load or moe_bias.Frozen returns"
    raise UserError(f"`base` is {named(base)}, no frozen model; {way}")


def refuse_other_layer(layer: object, base: Frozen, name: str = "layer") -> None:
    """Raises UserError where `layer` is no layer, or has other sizes than the model; call it `name`."""
    if isinstance(layer, str | Path):
        raise UserError(f"`{name}` is {shown(str(layer))}, a name; moe_bias.load_layer(folder, base) loads a layer")
    if not isinstance(layer, MoEBiasLayer):
        raise UserError(f"`{name}` is {named(layer)}, no layer; give what training or moe_bias.load_layer returns")
    sizes, wanted = (layer.hidden_size, layer.vocab_size), (base.head.hidden_size, base.head.vocab_size)
    if sizes != wanted:
        raise UserError(
            f"`{name}` is of another model: its hidden states and vocabulary are {sizes[0]} and {sizes[1]} wide, those "
            f"of `base` {wanted[0]} and {wanted[1]}"
        )


def config_of(given: Settings | None, kind: type[Settings], name: str = "config") -> Settings:
    """The config, the kind's defaults for None. Raises UserError where it is of another kind."""
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise UserError(f"`{name}` is {named(given)}; give moe_bias.{kind.__name__}(...)")
    return given


def named(value: object) -> str:
    """A value that has a short name by it, anything else by its type."""
    return shown(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"
