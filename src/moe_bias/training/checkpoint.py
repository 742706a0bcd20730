"""Checkpoints of a run: one safetensors file each, whole or absent, the last few kept.

A file holds the layer, the optimiser's moments and, where one is looked for, the best layer so far;
where the run stands is JSON in the file's header, with a checksum: a run would go on with damaged numbers
without a word. The order of the tokens and all that is drawn follow from seed and step, so nothing of them is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_bias.mistakes import SAME_CALL, Interrupted, UserError
from moe_bias.records import remove_left_overs, unfinished

FOLDER = "checkpoints"
LAYER = "layer."
"""What the names of the layer's tensors begin with."""
_CHECKSUM = "sha256"
_NAME = re.compile(r"step-[0-9]{8,}\.safetensors")


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
        self.run = run
        self.folder = run / FOLDER
        self.every = every
        self._keep = keep

    def latest(self) -> Path | None:
        """The newest one, or None."""
        found = _in_order(self.folder)
        return found[-1] if found else None

    def save(self, tensors: Mapping[str, Tensor], position: Standing) -> None:
        """Writes one. Raises UserError where it cannot be written; the ones before it stay."""
        path = self.folder / f"step-{position.step:08d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(path, tensors, position)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint {str(path)!r} cannot be written ({error}); make room, and {SAME_CALL} goes on "
                f"{self.where()}"
            ) from error
        self._remove_old()

    def load(self, kind: type[Where]) -> tuple[dict[str, Tensor], Where] | None:
        """Tensors (on the CPU) and position of the newest one, or None. Raises UserError on a damaged file.

        What a killed run left beyond the last `keep`, or half written, is removed.
        """
        self._remove_old()
        path = self.latest()
        if path is None:
            return None
        tensors, position = _read(path, "to go on from the one before")
        try:
            return tensors, kind(**position)
        except TypeError as error:
            raise UserError(f"checkpoint {str(path)!r} is of another kind of training ({error})") from error

    def _remove_old(self) -> None:
        """Several processes may do so at once."""
        remove_left_overs(self.folder)
        for old in _in_order(self.folder)[: -self._keep]:
            old.unlink(missing_ok=True)

    def interrupted(self) -> Interrupted:
        """What to raise where the run was interrupted."""
        return Interrupted(f"{SAME_CALL} goes on {self.where()}")

    def where(self) -> str:
        """Where a run that is started again goes on: 'from ...' or 'from the beginning'."""
        path = self.latest()
        return "from the beginning" if path is None else f"from {path}"


def saved_layers(run: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Step and layer of each checkpoint in a run's folder, oldest first, the layer's tensors by their names in it.

    Raises UserError on a damaged file.
    """
    for path in _in_order(run / FOLDER):
        tensors, position = _read(path, "to go on without")
        names = [name for name in tensors if name.startswith(LAYER)]
        yield position["step"], {name.removeprefix(LAYER): tensors[name] for name in names}


def _in_order(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=lambda path: (len(path.name), path.name))


def _read(path: Path, otherwise: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the position of a checkpoint. Raises UserError on a damaged file, which to remove `otherwise`."""
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        position = json.loads(metadata["position"])
        if not isinstance(position, dict) or type(position.get("step")) is not int:
            raise ValueError("it does not say where the run stands")
        # Those of before there was a checksum have none.
        if metadata.get(_CHECKSUM, _digest(tensors, metadata["position"])) != _digest(tensors, metadata["position"]):
            raise ValueError("its checksum does not fit")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {str(path)!r} is damaged ({error}); remove it {otherwise}") from error
    return tensors, position


def _digest(tensors: Mapping[str, Tensor], position: str) -> str:
    found = hashlib.sha256(position.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _write_whole(path: Path, tensors: Mapping[str, Tensor], position: Standing) -> None:
    """Writes the file beside its place, to the disk itself, and then moves it there."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    stands = json.dumps(asdict(position))
    with unfinished(path) as beside:
        save_file(whole, beside, metadata={"position": stands, _CHECKSUM: _digest(whole, stands)})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
