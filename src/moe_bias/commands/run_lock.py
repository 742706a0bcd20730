"""The folder of a run is looked at before any work, and is one run's as long as it goes on.

Two runs at once would mix their files. The system releases the lock of a process that is killed. Beside the lock
stands a note of who holds it, which counts only where the lock is held. Of processes that a launcher started together
the first one holds it for all.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import ReadWriteLock, Timeout

from moe_bias.mistakes import UserError, reason_of
from moe_bias.progress import text_console
from moe_bias.records import write_json
from moe_bias.training.processes import is_beside_the_first

LOCK, NOTE = ".run.lock", ".run.lock.json"
"""Names with a dot are no files of a run or a store."""


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
        with _locked(folder, command, shared, option):
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


@contextmanager
def _locked(folder: Path, command: str, shared: bool, option: str) -> Iterator[None]:
    lock = ReadWriteLock(folder / LOCK, is_singleton=False)
    try:
        (lock.acquire_read if shared else lock.acquire_write)(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{option} {str(folder)!r} is in use by {_holder(folder)}; wait for its end, or name another folder"
        ) from error
    except sqlite3.Error:
        sentence = f"{folder} can be given no lock by its file system: start no other run into it until this one ends"
        text_console(stderr=True).print(sentence, highlight=False, soft_wrap=True)
    try:
        write_json(folder / NOTE, _note(command))
        yield
    finally:
        lock.release(force=True)
        with suppress(Timeout, PermissionError, sqlite3.Error), lock.write_lock(blocking=False):
            for name in (NOTE, LOCK):
                (folder / name).unlink(missing_ok=True)


def _note(command: str) -> dict[str, str | int]:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"command": command, "process": os.getpid(), "machine": platform.node(), "started": started}


def _holder(folder: Path) -> str:
    """Who holds the lock; a note that is being written may not be there yet."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return "moe-bias {command}, process {process} on {machine}, since {started}".format(**note)
    except (OSError, ValueError, LookupError, TypeError):
        return "another run"
