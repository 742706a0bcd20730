"""A folder is one process's, or that of those who share it, as long as the process goes on.

Two at once would mix their files. The system releases the lock of a process that is killed. Beside the lock stands a
note of who holds it, which counts only where the lock is held.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import ReadWriteLock, Timeout

from moe_bias.mistakes import UserError
from moe_bias.progress import text_console
from moe_bias.records import write_json

LOCK, NOTE = ".run.lock", ".run.lock.json"
"""Names with a dot are no files of a run or a store."""


@contextmanager
def locked(folder: Path, command: str, shared: bool, option: str) -> Iterator[None]:
    """Holds the folder, which is there, while the block runs; `command` and `option` are for the sentences.

    Raises UserError where another process holds it, naming that.
    """
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
