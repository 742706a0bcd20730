"""Arms of a comparison, or cells of a sweep: run one by one, each kept as soon as it is done, and compared in pairs.

Every arm is measured unit by unit, on held-out examples or on problems, which are the same for all. What is measured of
a unit is averaged over the arm's seeds first; then units are resampled, paired with another arm's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from moe_bias.evaluation.statistics import Floats
from moe_bias.mistakes import SAME_CALL, Interrupted, UserError, as_kind, read_json
from moe_bias.records import RecordKind, provenance, write_json


class Arm(Protocol):
    """One training of an arm, with what was measured of it."""

    @property
    def name(self) -> str:
        """Of the arm."""

    @property
    def seed(self) -> int:
        """Of the training."""


Kept = TypeVar("Kept", bound=Arm)
Outcome = tuple[Kept, Mapping[str, Any]]
"""What was measured of an arm, and the settings that it was run with."""
Wanted = Mapping[tuple[str, int], Callable[[], Outcome[Kept]]]
"""By name and seed of an arm, what runs it."""


class ArmRecords(Generic[Kept]):
    """The records of finished arms in a folder, a JSON file each, which says what kind of comparison the arm is of."""

    def __init__(self, folder: Path, kind: RecordKind, arm: type[Kept]) -> None:
        self.folder = folder / "arms"
        self._earlier = folder / "cells"
        self._kind, self._arm = f"arm of {kind}", arm

    def load(self, name: str, seed: int) -> Kept | None:
        """The arm's record, or None. Raises UserError on a damaged one, and on one of another kind of comparison.

        Cells of a sweep had a folder of their own once, and no record said its kind.
        """
        paths = (folder / _file(name, seed) for folder in (self.folder, self._earlier))
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            return None
        what, remedy = f"record {str(path)!r}", "remove it to run the arm again"
        found = as_kind(dict[str, Any], read_json(path, "record", remedy), what, remedy)
        if found.get("kind", self._kind) != self._kind:
            raise UserError(f"{what} is an {found['kind']}, no {self._kind}; name another `output`")
        return as_kind(self._arm, found.get("arm", found.get("cell")), what, remedy)

    def save(self, arm: Kept, settings: Mapping[str, Any]) -> None:
        """Keeps an arm with its settings and what it was made with."""
        content = {"kind": self._kind, "arm": vars(arm), "settings": settings, "provenance": provenance()}
        write_json(self.folder / _file(arm.name, arm.seed), content)

    def all(self, names: Sequence[str]) -> list[Kept]:
        """Those of these names that have a record, in their order, then of seeds. Raises UserError on a damaged one."""
        found = (self.load(name, seed) for name in names for seed in sorted(self._seeds(name)))
        return [arm for arm in found if arm is not None]

    def run_missing(self, wanted: Wanted[Kept]) -> list[Kept]:
        """Runs the arms that have no record, each kept as soon as it is done; returns all that are wanted.

        Raises Interrupted on Ctrl-C, saying how many are done, or how much is extracted.
        """
        try:
            for (name, seed), run in wanted.items():
                if self.load(name, seed) is None:
                    self.save(*run())
        except Interrupted:
            raise
        except KeyboardInterrupt as interrupt:
            done = sum(self.load(*each) is not None for each in wanted)
            raise Interrupted(
                f"{done} of {len(wanted)} are done and kept in {self.folder}; run {SAME_CALL} again for the others"
            ) from interrupt
        found = [self.load(*each) for each in wanted]
        return [arm for arm in found if arm is not None]

    def _seeds(self, name: str) -> list[int]:
        found = (path.stem.removeprefix(f"{name}-seed") for path in self.folder.glob(f"{name}-seed*.json"))
        return [int(seed) for seed in found if seed.isdecimal()]


def arm_name(name: str, seed: int) -> str:
    """What the files of one training of an arm are called."""
    return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '_', name)}-seed{seed}"


def _file(name: str, seed: int) -> str:
    return f"{arm_name(name, seed)}.json"


def by_name(arms: Sequence[Kept], units: Callable[[Kept], object], noun: str) -> dict[str, list[Kept]]:
    """The trainings of each arm, in order of appearance. Raises UserError where two were measured on other `units`."""
    groups: dict[str, list[Kept]] = {}
    for arm in arms:
        if units(arm) != units(arms[0]):
            raise UserError(f"the records of {arm.name!r} and {arms[0].name!r} are of different held-out {noun}")
        groups.setdefault(arm.name, []).append(arm)
    return groups


def over_seeds(measured: Sequence[Mapping[str, list[float]]]) -> dict[str, Floats]:
    """By what was measured and by unit, the mean over the trainings of an arm."""
    return {name: np.mean([one[name] for one in measured], axis=0) for name in measured[0]}
