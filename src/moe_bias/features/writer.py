"""The folder of a feature store that is being made: which shards it has, and that none is ever half there.

Each shard is written beside its place, synced and renamed, then listed in `unfinished.json`; the
last step renames that to `manifest.json`. A process killed between any two of these steps leaves a
folder that the next run continues: a shard that is not listed is made again, and comes out the same.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from moe_bias.features.checked import damaged
from moe_bias.features.manifest import (
    MANIFEST,
    SECONDS,
    UNFINISHED,
    Manifest,
    Recipe,
    Shard,
    first_difference,
    load_manifest,
    other_store,
    sealed,
    seconds_spent,
    shard_file,
)
from moe_bias.limits import in_bytes
from moe_bias.mistakes import SAME_CALL, UserError
from moe_bias.records import remove_left_overs, write_json, write_whole

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class StoreFolder:
    """A store in the making; `manifest` lists its whole shards, and is None before anything was begun."""

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        """Use `begun`, which looks at what is there."""
        self.folder = folder
        self.manifest = manifest
        self._started = time.perf_counter()
        self._spent_before = seconds_spent(folder)

    @classmethod
    def begun(cls, folder: Path, recipe: Recipe) -> StoreFolder:
        """What is in the folder of the store with this recipe, of its shards those that are what was written.

        Raises UserError where the folder holds a store made in another way, naming the field, or
        other files.
        """
        found = next((folder / name for name in (MANIFEST, UNFINISHED) if (folder / name).is_file()), None)
        if found is None:
            _refuse_other_files(folder)
            return cls(folder, None)
        manifest = load_manifest(found)
        wrong = first_difference(manifest.recipe, recipe)
        if wrong is not None:
            raise other_store(folder, manifest, wrong)
        wrong_files = {shard.file for shard in damaged(folder, manifest.shards)}
        whole = [shard for shard in manifest.shards if shard.file not in wrong_files]
        return cls(folder, manifest.model_copy(update={"shards": whole}))

    @property
    def begun_manifest(self) -> Manifest:
        """The manifest, once there is one."""
        assert self.manifest is not None
        return self.manifest

    @property
    def was_complete(self) -> bool:
        """Whether the store was finished once; shards may have been damaged or lost since."""
        return (self.folder / MANIFEST).is_file()

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.was_complete and not self.missing()

    def missing(self) -> list[int]:
        """Numbers of the shards still to be made."""
        there = {shard.file for shard in self.begun_manifest.shards}
        return [number for number in range(self.begun_manifest.num_shards) if shard_file(number) not in there]

    def check_disk(self, expected: int) -> None:
        """Raises UserError where a store of this many bytes does not fit beside what is on its disk."""
        there = 0 if self.manifest is None else self.manifest.bytes
        parent = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        free, needed = shutil.disk_usage(parent).free, expected - there
        if needed > free:
            raise UserError(
                f"{str(self.folder)!r} needs {in_bytes(needed)} and its disk has {in_bytes(free)} free; make room, "
                "name another disk, or keep half the bytes with `dtype` bfloat16"
            )

    def begin(self, manifest: Manifest) -> None:
        """Claims the folder. Raises UserError where another run has claimed it meanwhile."""
        _refuse_other_files(self.folder)
        self._list(manifest)

    def add(self, number: int, columns: Mapping[str, Tensor]) -> None:
        """Writes a shard without the tokens below the threshold, and lists it. Raises UserError on a full disk."""
        with self.writing(shard_file(number)):
            self.reopen()
            self.enter(write_shard(self.folder, number, columns, self.begun_manifest.threshold))

    def enter(self, shard: Shard) -> None:
        """Lists a shard that is written."""
        shards = sorted([*self.begun_manifest.shards, shard], key=lambda shard: shard.file)
        self._list(self.begun_manifest.model_copy(update={"shards": shards}))

    @contextmanager
    def writing(self, file: str) -> Iterator[None]:
        """Turns what the system says of a file that cannot be written into UserError, with what is whole."""
        try:
            yield
        except OSError as error:
            full = error.errno in _FULL_DISK
            reason = f"the disk of {str(self.folder)!r} is full" if full else f"{file} cannot be written ({error})"
            raise UserError(f"{reason}: {self.so_far()}") from error

    def finish(self) -> Manifest:
        """Makes the store complete, once no shard is missing; returns its manifest."""
        assert not self.missing()
        if not self.is_complete:
            remove_left_overs(self.folder)
            (self.folder / UNFINISHED).replace(self.folder / MANIFEST)
        return self.begun_manifest

    def so_far(self) -> str:
        """A few words on what an interrupted run leaves."""
        if self.manifest is None:
            return "no shard was written"
        return (
            f"{len(self.manifest.shards)} of {self.manifest.num_shards} shards are whole in {str(self.folder)!r}; "
            f"{SAME_CALL} continues there"
        )

    def _list(self, manifest: Manifest) -> None:
        write_json(self.folder / UNFINISHED, sealed(manifest))
        self.manifest = manifest
        spent = self._spent_before + time.perf_counter() - self._started
        write_json(self.folder / SECONDS, {"seconds": spent})

    def reopen(self) -> None:
        """A complete store that lost a shard is an unfinished one again."""
        if (self.folder / MANIFEST).is_file():
            (self.folder / MANIFEST).replace(self.folder / UNFINISHED)


def write_shard(folder: Path, number: int, columns: Mapping[str, Tensor], threshold: float | None) -> Shard:
    """Writes the tokens of a shard that are at or above the threshold; what to list. Raises OSError on a full disk."""
    kept = columns if threshold is None else _kept(columns, threshold)
    content = save(dict(kept), metadata={"format": "pt"})
    write_whole(folder / shard_file(number), content)
    return Shard(
        file=shard_file(number),
        tokens=len(kept["token"]),
        dropped=len(columns["token"]) - len(kept["token"]),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _kept(columns: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    rows = (columns["entropy"].double() >= threshold).nonzero().squeeze(-1)
    return {name: column[rows] for name, column in columns.items()}


def _refuse_other_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(f"{str(folder)!r} holds other files; name a new folder or an empty one")
