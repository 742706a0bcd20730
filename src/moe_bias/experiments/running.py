"""Arms that are run one by one, each kept as soon as it is done, and those that are kept already not run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moe_bias.mistakes import Interrupted

Kept = TypeVar("Kept")
Outcome = tuple[Kept, Mapping[str, Any]]
"""What was measured of an arm, and the settings that it was run with."""
Wanted = Mapping[tuple[str, int], Callable[[], Outcome[Kept]]]
"""By name and seed of an arm, what runs it."""


class Records(Protocol[Kept]):
    """A folder of arms' records."""

    folder: Path

    def load(self, name: str, seed: int) -> Kept | None:
        """What is kept of an arm, or None."""

    def save(self, arm: Kept, settings: Mapping[str, Any]) -> None:
        """Keeps an arm."""


def run_missing(records: Records[Kept], wanted: Wanted[Kept]) -> list[Kept]:
    """Runs the arms that have no record, each kept as soon as it is done; returns all that are wanted.

    Raises Interrupted on Ctrl-C, saying how many are done, or how much is extracted.
    """
    try:
        for (name, seed), run in wanted.items():
            if records.load(name, seed) is None:
                records.save(*run())
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:
        done = sum(records.load(name, seed) is not None for name, seed in wanted)
        raise Interrupted(
            f"{done} of {len(wanted)} are done and kept in {records.folder}; run the same command again for the others"
        ) from interrupt
    found = [records.load(name, seed) for name, seed in wanted]
    return [arm for arm in found if arm is not None]
