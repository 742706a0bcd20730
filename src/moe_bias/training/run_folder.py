"""The folder of a run: what the run is, so that only the same one goes on in it.

`run.json` holds the settings and digests of the tokens and of their hidden states. It is written before
the first checkpoint, and looked at before anything else happens in a folder that has checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_bias.features.source import FeatureSource
from moe_bias.mistakes import UserError, as_kind, read_json
from moe_bias.records import write_json

FILE = "run.json"
_REMEDY = "name another `output`"
_FREE = frozenset(
    {"output", "checkpoint_every", "keep_checkpoints", "features", "keep_features", "grid", "base", "seeds", "arms"}
    | {"target_features", "endpoint", "engine_memory", "workers", "ray"}
)
"""Settings that do not change what a run, or a cell of a sweep, ends with."""


def refuse_other_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError naming the first setting in which the folder's unfinished run differs."""
    before = _read(folder)
    if before is None:
        return
    now = json.loads(json.dumps(settings))
    for name, value in now.items():
        old = before["settings"].get(name)
        if name not in _FREE and old != value:
            raise UserError(
                f"{str(folder)!r} holds an unfinished run with `{name}` {old}, not {value}; "
                f"give its settings to go on with it, or another `output`"
            )


def begin(folder: Path, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Writes down what the run is: its settings, and by name what else it depends on.

    Raises UserError where an unfinished run of the folder is another.
    """
    refuse_other_settings(folder, settings)
    before = _read(folder)
    for name, value in data.items():
        if before is not None and before["data"].get(name) != value:
            raise UserError(
                f"{str(folder)!r} holds an unfinished run with other {name}; "
                "give what it was started with to go on with it, or another `output`"
            )
    write_json(folder / FILE, {"settings": settings, "data": data})


def digests(train: FeatureSource, held_out: FeatureSource) -> dict[str, str]:
    """By name, what tells a run's features from others."""
    return {
        "training tokens": digest([train.support, train.token]),
        "held-out tokens": digest([held_out.support, held_out.token]),
        "hidden states": digest(chain(train.contents(), held_out.contents())),
    }


def digest(parts: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / FILE
    if not path.is_file():
        return None
    found: dict[str, Any] = read_json(path, "file", _REMEDY)
    as_kind(_Run, found, f"file {str(path)!r}", _REMEDY)
    return found


@dataclass(frozen=True)
class _Run:
    """What `run.json` holds."""

    settings: dict[str, Any]
    data: dict[str, Any]
