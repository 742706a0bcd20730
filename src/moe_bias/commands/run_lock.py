"""The folder of a run is looked at before any work, and is one run's as long as it goes on.

Of processes that a launcher started together the first one holds its lock for all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_bias.folder_lock import locked
from moe_bias.mistakes import UserError, reason_of
from moe_bias.training.processes import is_beside_the_first


@contextmanager
def held(
    folder: Path, command: str, files: Sequence[str], shared: bool = False, option: str = "--output"
) -> Iterator[None]:
    """Holds the folder that an option names while the block runs; `files` are what the command writes there last.

    A `shared` folder may be held by others that share it too. Raises UserError where another run holds it, naming
    that, and where the folder cannot be written. What was made for this alone is removed after it.
    """
    if is_beside_the_first():
        yield
        return
    refuse_unwritable(folder, files, option)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        _try_to_write(folder, option)
        with locked(folder, command, shared, option):
            yield
    finally:
        for place in made:
            with suppress(OSError):  # it holds something now
                place.rmdir()


def refuse_unwritable(folder: Path, files: Sequence[str] = (), option: str = "--output") -> None:
    """Raises UserError where the folder cannot be made, or nothing written into it: a run would find out last."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise UserError(f"{option} {str(folder)!r} cannot be a folder: {str(place)!r} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} {str(folder)!r} cannot be written: {str(place)!r} does not allow it")
    for file in files:
        if (folder / file).is_dir():
            raise UserError(f"{option} {str(folder)!r} cannot be used: {file} in it is a folder, and is to be a file")


def _try_to_write(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {str(folder)!r} cannot be written: {reason_of(error)}; name another folder"
        ) from error
