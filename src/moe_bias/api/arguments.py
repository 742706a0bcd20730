"""Arguments of another kind than a call takes: a name in place of a model, a layer of another model, two exchanged.

Each is told in one sentence that says what to give, before any work begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from moe_bias.combined import Part
from moe_bias.config import Config
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError, shown
from moe_bias.serving.asked import finite

Settings = TypeVar("Settings", bound=Config)


def refuse_other_base(base: object, name: str = "base") -> None:
    """Raises UserError where `base` is no frozen model; call it `name`."""
    if isinstance(base, Frozen):
        return
    if isinstance(base, str | Path):
        way = f"moe_bias.load({str(base)!r}) loads one by its name"
    elif isinstance(base, nn.Module):
        way = "moe_bias.Frozen(model, tokenizer) makes one of a model in memory"
    else:
        way = "give what moe_bias.load or moe_bias.Frozen returns"
    raise UserError(f"`{name}` is {named(base)}, no frozen model; {way}")


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


Layers = MoEBiasLayer | Sequence[MoEBiasLayer] | Mapping[MoEBiasLayer, float]
"""One layer; several, each at its own strength; or each at the strength beside it, in the place of its own."""


def parts_of(layers: Layers | None, base: Frozen, name: str = "layer") -> list[Part]:
    """The layers with their strengths; none for None.

    Raises UserError where there is something else among them, a layer of another model, one that is there twice, a
    strength that is no finite number, or no layer at all.
    """
    if layers is None:
        return []
    pairs: list[tuple[object, object]]
    if isinstance(layers, Mapping):
        pairs = list(layers.items())
    else:
        pairs = [(layer, None) for layer in (layers if isinstance(layers, list | tuple) else [layers])]
    if not pairs:
        raise UserError(f"`{name}` is empty; give a layer, or None for the frozen model")
    parts: list[Part] = []
    for number, (layer, strength) in enumerate(pairs, 1):
        refuse_other_layer(layer, base, name)
        assert isinstance(layer, MoEBiasLayer)
        if any(layer is other for other, _ in parts):
            raise UserError(f"`{name}` has a layer twice; give a mapping of layers to strengths to make it stronger")
        own = layer.strength if strength is None else finite(f"strength {number} of `{name}`", strength)
        parts.append((layer, own))
    return parts


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
