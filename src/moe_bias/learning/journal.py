"""The journal of an adapter: everything that it was told, in order, in one file that only grows.

An entry is on the disk before anyone is told that it was taken. A process that is killed while it writes leaves half
an entry at the end at most, which was never acknowledged and goes when the journal is opened again.

    sizes       2 x uint32    of the header and of the tensors, in bytes, little-endian
    checksum    uint32        CRC-32 of both
    header      JSON          `number` from 1 on, `event`, what belongs to it, and `config` where that is new
    tensors     safetensors   of a lesson or a state; empty for other events

A journal that has grown long is cut: a new file begins with the learner's whole state as its first entry.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, save
from torch import Tensor

from moe_bias.mistakes import UserError
from moe_bias.records import write_parts, write_whole

_SIZES = struct.Struct("<III")


@dataclass(frozen=True)
class Entry:
    """`number` counts on from 1; `event` is what happened; `tensors` belong to it; `end` is where the next begins."""

    number: int
    event: str
    header: Mapping[str, Any]
    tensors: dict[str, Tensor]
    end: int


class Journal:
    """The writer's side of one file; one process at a time has it open."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file, and cuts off a half entry at its end. Raises UserError on one that is damaged.

        `config` is the one that the next entry is applied with, None where none is said.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.last = self._state_size = 0
        self.config: Any = None
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for header, _, end in _read(file, path):
                    self._state_size = end if header["event"] == STATE else self._state_size
                    self.last, whole = header["number"], end
                    self.config = header.get(CONFIG, self.config)
        self._file = path.open("r+b" if path.exists() else "x+b")
        self._file.truncate(whole)
        self._file.seek(whole)

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return self._file.tell()

    @property
    def grown(self) -> int:
        """Bytes that came after the state that the file begins with."""
        return self.size - self._state_size

    def append(self, event: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> int:
        """Adds an entry and returns its number once it is on the disk.

        Raises OSError where the disk does not take it; the journal is then as it was before.
        """
        start, number = self._file.tell(), self.last + 1
        try:
            self._file.write(_packed(number, event, header, tensors))
            self._file.flush()
            os.fdatasync(self._file.fileno())
        except OSError:
            self._file.seek(start)
            self._file.truncate(start)
            raise
        self.last, self.config = number, header.get(CONFIG, self.config)
        return number

    def begin_anew(self, state: Path, through: int) -> None:
        """Puts a file of `write_state`, whose state holds all entries up to `through`, in the place of those."""
        with self.path.open("rb") as file:
            ends = {header["number"]: end for header, _, end in _read(file, self.path)}
            file.seek(ends[through])
            later = file.read()
        before = state.read_bytes()
        write_parts(self.path, [before, later])
        self._file.close()
        self._file = self.path.open("r+b")
        self._file.seek(0, os.SEEK_END)
        self._state_size = len(before)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


CONFIG = "config"
"""What an entry's header has where its config is another than that of the entries before it."""
STATE = "state"
"""The event of an entry that holds a learner's whole state, up to and with the entry of its number."""


def write_state(path: Path, number: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A journal of one entry: the state of a learner that has applied all entries up to `number`."""
    write_whole(path, _packed(number, STATE, header, tensors))


def beginning(path: Path) -> bytes:
    """What a file is known by until it is cut: its first bytes, the sizes and the checksum of its first entry."""
    with path.open("rb") as file:
        return file.read(_SIZES.size)


def entries(path: Path, start: int = 0, begins: bytes | None = None) -> Iterator[Entry]:
    """Whole entries from byte `start` on, or all where the file does not begin with `begins` any more.

    Raises UserError on a damaged one; a half entry at the end ends it.
    """
    with path.open("rb") as file:
        file.seek(start if begins is None or file.read(_SIZES.size) == begins else 0)
        for header, content, end in _read(file, path):
            number, event = header.pop("number"), header.pop("event")
            yield Entry(number, event, header, _aligned(content), end)


def first_header(path: Path) -> dict[str, Any]:
    """The header of the first whole entry, without its tensors; empty where there is none. Raises as `entries`."""
    with path.open("rb") as file:
        return next((header for header, _, _ in _read(file, path)), {})


def _aligned(content: bytes) -> dict[str, Tensor]:
    """Tensors in memory of their own: last bits of a product may depend on where in memory its factors begin."""
    return {name: tensor.clone() for name, tensor in load(content).items()} if content else {}


def _read(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """The header, the tensors' bytes and the end of each whole entry from the file's place on."""
    while len(sizes := file.read(_SIZES.size)) == _SIZES.size:
        start = file.tell() - _SIZES.size
        header_size, tensors_size, checksum = _SIZES.unpack(sizes)
        content = file.read(header_size + tensors_size)
        if len(content) < header_size + tensors_size:
            return
        if zlib.crc32(content) != checksum:
            if not file.read(1):
                return  # the system had not written all of the last one when the machine went down
            raise UserError(
                f"the journal {str(path)!r} is damaged at byte {start:,}; bring it back from a copy, or remove it to "
                "begin anew with the adapter as it was at first"
            )
        yield json.loads(content[:header_size]), content[header_size:], file.tell()


def _packed(number: int, event: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> bytes:
    head = json.dumps({"number": number, "event": event, **header}).encode()
    body = save({name: _alone(tensor) for name, tensor in tensors.items()}) if tensors else b""
    return _SIZES.pack(len(head), len(body), zlib.crc32(head + body)) + head + body


def _alone(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().clone(memory_format=torch.contiguous_format)
