"""Records as they were written before: what they lack, and what they called otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_bias.records import RecordKind

_KEYS = {
    RecordKind.SUPERVISED: {"base_nll", "adapted_nll", "change"},
    RecordKind.POLICY: {"accuracy", "right", "position"},
    RecordKind.EVALUATION: {"problems", "protocol", "arms"},
    RecordKind.ANALYSIS: {"format", "text", "adapters"},
    RecordKind.DEMO: {"arms", "samples", "expert_share"},
    RecordKind.INSPECTION: {"inspection"},
}
"""The keys of a record that no other kind has together; tables are told apart by their rows."""
_ROW_KEYS = {RecordKind.CELLS: "nll", RecordKind.ARMS: "accuracy"}
_NAMED_ANEW = {"forks": "flips", "forks_high": "flips_high"}


def guessed_kind(content: Mapping[str, Any]) -> RecordKind | None:
    """The kind of a record that does not say it, by its keys; None where no kind has them."""
    for kind, keys in _KEYS.items():
        if keys <= content.keys():
            return kind
    rows = content.get("rows")
    for kind, key in _ROW_KEYS.items():
        if isinstance(rows, list) and all(isinstance(row, dict) and key in row for row in rows):
            return kind
    return None


def with_flips(content: dict[str, Any]) -> dict[str, Any]:
    """The record of an analysis in which places where the choice changes were called forks; others as they are."""
    if content.get("format") != "moe-bias analysis 1" or not isinstance(content.get("adapters"), list):
        return content
    return content | {"adapters": [_named_anew(adapter) for adapter in content["adapters"]]}


def _named_anew(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    anew = {_NAMED_ANEW.get(name, name): value for name, value in found.items()}
    return anew | {"answers": _named_anew(anew["answers"])} if "answers" in anew else anew
