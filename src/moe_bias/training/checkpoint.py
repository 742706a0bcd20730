"""Checkpoints of a run: one safetensors file each, whole or absent, the last few kept.

A file holds the layer, the optimiser's moments and, where one is looked for, the best layer so far;
where the run stands is JSON in the file's header. The order of the tokens and all that is drawn
follow from seed and step, so nothing of them is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_bias.config import UserError

FOLDER = "checkpoints"
LAYER = "layer."
"""What the names of the layer's tensors begin with."""
_SUFFIX = ".safetensors"
_BESIDE = ".unfinished-"


@dataclass(frozen=True)
class Standing:
    """Where a run stands: steps taken, and what its kind of training adds, as JSON values."""

    step: int = 0


@dataclass(frozen=True)
class Position(Standing):
    """Where a supervised run stands: the last held-out NLL, the best, its step, and evaluations since then."""

    last_nll: float | None = None
    best_nll: float | None = None
    best_step: int = 0
    worse: int = 0


Where = TypeVar("Where", bound=Standing)


class Checkpoints:
    """The checkpoints in a run's folder, written every `every` steps; the last `keep` stay."""

    def __init__(self, run: Path, every: int, keep: int) -> None:
        self.folder = run / FOLDER
        self.every = every
        self._keep = keep

    def latest(self) -> Path | None:
        """The newest one, or None."""
        found = _in_order(self.folder)
        return found[-1] if found else None

    def save(self, tensors: Mapping[str, Tensor], position: Standing) -> None:
        """Writes one. Raises UserError where it cannot be written; the ones before it stay."""
        path = self.folder / f"step-{position.step:08d}{_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(path, tensors, position)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint {str(path)!r} cannot be written ({error}); make room and run the same command again, "
                f"which goes on {self.where()}"
            ) from error
        for old in _in_order(self.folder)[: -self._keep]:
            old.unlink()

    def load(self, kind: type[Where]) -> tuple[dict[str, Tensor], Where] | None:
        """Tensors (on the CPU) and position of the newest one, or None. Raises UserError on a damaged file."""
        path = self.latest()
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, kind(**json.loads(file.metadata()["position"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"checkpoint {str(path)!r} is damaged; remove it to go on from the one before") from error

    def where(self) -> str:
        """Where a run that is started again goes on: 'from ...' or 'from the beginning'."""
        path = self.latest()
        return "from the beginning" if path is None else f"from {path}"


def saved_layers(run: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Step and layer of each checkpoint in a run's folder, oldest first, the layer's tensors by their names in it.

    Raises UserError on a damaged file.
    """
    for path in _in_order(run / FOLDER):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(LAYER)]  # noqa: SIM118
                tensors = {name.removeprefix(LAYER): file.get_tensor(name) for name in names}
                step = json.loads(file.metadata()["position"])["step"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"checkpoint {str(path)!r} is damaged ({error}); remove it to go on without") from error
        yield step, tensors


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step-*{_SUFFIX}"))


def _write_whole(path: Path, tensors: Mapping[str, Tensor], position: Standing) -> None:
    """Writes the file beside its place, to the disk itself, and then moves it there."""
    for left in path.parent.glob(f"{_BESIDE}*"):
        left.unlink()
    beside = path.with_name(_BESIDE + path.name)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, beside, metadata={"position": json.dumps(asdict(position))})
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
