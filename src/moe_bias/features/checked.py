"""Whether shards are what was written, by their checksums, and which were found so before.

Reading a store whole takes as long as its disk takes. So what was found whole is written down beside the shards,
by size, time of the last change and inode of the file: until one of them is another, the shard is not read
again. What this does not see is a change that leaves all three as they were, of a disk that decays or of a program
that sets the time back; `moe-bias verify` reads everything, whatever is written down.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_bias.features.manifest import Shard
from moe_bias.progress import Meter, meter
from moe_bias.records import write_json

CHECKED = ".checked.json"
_HASH_BYTES = 2**24
_SHOWN_BYTES = 2**28
"""From so many bytes on, a second's reading, a bar is drawn."""
_YOUNG_NANOSECONDS = 2 * 10**9
"""A file that was written to so short ago could be written to again within the same tick of its time."""

_Stamp = list[Any]


def damaged(folder: Path, shards: Sequence[Shard], *, anew: bool = False) -> list[Shard]:
    """Those shards whose file is missing or not what was written; `anew` also reads what was found whole before."""
    before = _written_down(folder)
    stamps = {shard.file: _stamp(folder / shard.file, shard) for shard in shards}
    known = {} if anew else {file: stamp for file, stamp in stamps.items() if stamp and before.get(file) == stamp}
    todo = [shard for shard in shards if shard.file not in known]
    total = sum(shard.bytes for shard in todo)
    started = time.time_ns()
    with meter("checksums of the shards", total, "bytes", visible=total >= _SHOWN_BYTES) as bar:
        wrong = {shard.file: shard for shard in todo if not _is_whole(folder / shard.file, shard, bar)}
    for shard in todo:
        stamp = stamps[shard.file]
        if stamp is None or shard.file in wrong or started - stamp[1] <= _YOUNG_NANOSECONDS:
            continue
        if stamp == _stamp(folder / shard.file, shard):
            known[shard.file] = stamp
    if known != before:
        _write_down(folder, known)
    return list(wrong.values())


def _is_whole(path: Path, shard: Shard, bar: Meter) -> bool:
    """Whether it is a file of the size and the checksum that were written; a pipe is not waited for."""
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
                bar.advance(len(block))
    except OSError:
        return False
    return digest.hexdigest() == shard.sha256


def _stamp(path: Path, shard: Shard) -> _Stamp | None:
    """Of the file that is there now, and of what it should hold."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino, shard.sha256]


def _written_down(folder: Path) -> dict[str, _Stamp]:
    """Nothing where the note cannot be read: then all is read, and the note made anew."""
    path = folder / CHECKED
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_down(folder: Path, known: dict[str, _Stamp]) -> None:
    with suppress(OSError):  # a store that cannot be written to is read whole each time
        write_json(folder / CHECKED, known)
