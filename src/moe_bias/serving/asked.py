"""Which adapters a request asks for, however it says so; the same on every server.

"formal"                           one, at its own strength or at `moe_bias_strength`
"formal+medical"                   several, each at its own strength
{"formal": 0.7, "medical": 1.0}    any number, each at the strength beside it, in the place of its own
'{"formal": 0.7, "medical": 1.0}'  the same as a text, where a protocol takes no mapping
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping

from moe_bias.mistakes import UserError, shown

NAME, STRENGTH = "moe_bias", "moe_bias_strength"
Strengths = Mapping[str, float | None]
"""Names of adapters with the strength that each is applied with, None being its own; at least one."""


def asked_adapters(given: object, strength: object, names: Callable[[], Collection[str]]) -> Strengths:
    """What `moe_bias` and `moe_bias_strength` (None: left out) ask for, in the order of the names.

    `names` are those of the adapters that there are: one that has a '+' in its name is itself and no sum. Whether
    there is an adapter of each name is not looked at. Raises UserError on whatever is not of the forms above.
    """
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        return _named(given, strength, names)
    mapping = _mapping(given)
    if strength is not None:
        raise UserError(
            f"{STRENGTH!r} stands beside a mapping in {NAME!r}; give each adapter's strength in the mapping"
        )
    if not mapping:
        raise UserError(f"{NAME!r} is an empty mapping; name an adapter in it, or leave it out for the plain model")
    return {name: finite(f"the strength of {name!r}", mapping[name]) for name in sorted(mapping)}


def finite(name: str, value: object) -> float:
    """The number. Raises UserError, calling it `name`, where it is none, or not finite as a float."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise UserError(f"{name} must be a finite number, got {shown(value)}")


def _named(given: str, strength: object, names: Callable[[], Collection[str]]) -> Strengths:
    if "+" not in given or given in names():
        return {given: None if strength is None else finite(repr(STRENGTH), strength)}
    if strength is not None:
        raise UserError(
            f"{STRENGTH!r} stands beside the several adapters {given!r}; give a mapping in {NAME!r}, which has a "
            "strength for each"
        )
    several = given.split("+")
    for name in several:
        if several.count(name) > 1:
            raise UserError(f"{given!r} names the adapter {name!r} twice; its strength in a mapping makes it stronger")
    return dict.fromkeys(sorted(several))


def _mapping(given: object) -> Mapping[str, object]:
    if isinstance(given, str):
        try:
            given = json.loads(given, object_pairs_hook=_without_repeats)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{NAME!r} is {shown(given)}, which is no JSON object of adapters and strengths") from error
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise UserError(
            f"{NAME!r} must be the name of an adapter, or a mapping of names to strengths, got {shown(given)}"
        )
    return given


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{NAME!r} names the adapter {twice!r} twice; give it one strength")
    return found
