"""GGUF files, the model files of llama.cpp: which one a name stands for, what it holds, and the model of transformers.

A file is converted once, into safetensors in float32 under the cache: it then loads in a second, and everything that
takes a model of transformers takes it. The converted model is found by the file's content.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from moe_bias.extras import need
from moe_bias.limits import in_bytes, refuse_beyond_memory
from moe_bias.mistakes import UserError, reason_of, shown
from moe_bias.progress import say, text_console, without_bars_of_others
from moe_bias.records import whole_folder

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""What a value's type is called in Python's struct."""
_UNSUPPORTED = re.compile(r"ggml type (\d+)")
_FLOAT32_BYTES = 4
_DIGITS_OF_A_KEY = 16


@dataclass(frozen=True)
class Stored:
    """One tensor as a GGUF file names it: sizes, GGML's number of its type, and where its data begins."""

    name: str
    sizes: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: single values by their keys, tensors, and where the tensors' data begins."""

    path: Path
    values: dict[str, Any]
    tensors: tuple[Stored, ...]
    data: int


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a model's name stands for: it, or the only one in a folder; None where the name is no such.

    Raises UserError where a file with this name is missing or is of another kind, where it is a part of a model, and
    where a folder holds several.
    """
    path = Path(name)
    if path.is_dir():
        return _only_one_in(path)
    if not path.exists():
        if path.suffix.lower() == SUFFIX:
            raise UserError(f"model {name!r} cannot be loaded: there is no such file")
        return None
    if _beginning(path) != _MAGIC:
        raise UserError(
            f"model {name!r} is a file, and no GGUF file, which begins with the letters GGUF; "
            "name such a file, or a folder with a model in it"
        )
    _refuse_parts([path])
    return path


def _beginning(path: Path) -> bytes:
    """As many bytes as the mark of a GGUF file has; none of what has no size, whose reading may never begin."""
    try:
        if not path.is_file() or path.stat().st_size < len(_MAGIC):
            return b""
        with path.open("rb") as file:
            return file.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"model {str(path)!r} cannot be read: {reason_of(error)}") from error


def is_converted(file: Path, cache_folder: Path) -> bool:
    """Whether the cache holds the model of a GGUF file."""
    return _kept(_place(file, cache_folder)) is not None


def gguf_config(file: Path) -> Any:
    """The config of transformers that a GGUF file describes; raises UserError where it does not."""
    header = _checked(file)
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # a damaged file makes its loader raise anything
        raise _refused(header, error) from error


def converted(file: Path, cache_folder: Path) -> Path:
    """The folder of the model of a GGUF file in the cache, which holds it from then on.

    Of two processes that want the same one the second waits. Raises UserError where the package gguf is missing, the
    file is damaged, cut off or of types or an architecture that transformers does not read, and where the disk has no
    room for the weights in float32.
    """
    place = _place(file, cache_folder)
    found = _kept(place)
    if found is not None:
        return found
    header = _checked(file)
    size = sum(_FLOAT32_BYTES * prod(tensor.sizes) for tensor in header.tensors)
    refuse_beyond_memory(size, f"model {str(file)!r} in float32", "take a smaller model")
    place.mkdir(parents=True, exist_ok=True)
    _refuse_without_room(file, place, size)
    target = place / (file.stem.lstrip(".") or "model")
    console = text_console(stderr=True)
    with _alone_in(place, console, file):
        found = _kept(place)
        if found is None:
            say(console, f"Converting {file} once, to {in_bytes(size)} in {target}.")
            convert(file, target)
    return found or target


@without_bars_of_others()
def convert(file: Path, target: Path) -> None:
    """Makes the folder `target`, model and tokenizer of a GGUF file in float32, whole or not at all.

    Raises UserError as `converted`.
    """
    header = _checked(file)
    config = gguf_config(file)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        raise _refused(header, error) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would make them up, at random
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model {str(file)!r} cannot be loaded: it has no weights for {missing[0]}{more}")
    with whole_folder(target) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def read_header(file: Path) -> Header:
    """What stands before the tensors' data. Raises UserError on a file that is cut off there, or of another version.

    Of lists it keeps nothing: vocabularies are long.
    """
    try:
        with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
            return _header(file, content)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"model {str(file)!r} is cut off or damaged: its header has no end; fetch it anew") from error


def _only_one_in(folder: Path) -> Path | None:
    if (folder / "config.json").exists():
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())
    if not files:
        return None
    _refuse_parts(files)
    if len(files) > 1:
        raise UserError(
            f"model {str(folder)!r} is a folder with {len(files)} GGUF files, "
            f"{', '.join(path.name for path in files)}; name one of them"
        )
    return gguf_of(str(files[0]))


def _refuse_parts(files: list[Path]) -> None:
    for file in files:
        found = _PART.search(file.name)
        if found is not None:
            number, parts = map(int, found.groups())
            raise UserError(
                f"model {str(file)!r} is part {number} of {parts} of a split GGUF file, which transformers does not "
                "read; join the parts with llama.cpp: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            )


def _header(path: Path, content: mmap) -> Header:
    release, tensors, keys = struct.unpack_from("<IQQ", content, len(_MAGIC))
    if release not in _VERSIONS:
        raise UserError(f"model {str(path)!r} is a GGUF file of version {release}; versions 2 and 3 can be read")
    place = len(_MAGIC) + struct.calcsize("<IQQ")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key, place = _string(content, place)
        values[key], place = _value(content, place)
    found = []
    for _ in range(tensors):
        tensor, place = _stored(content, place)
        found.append(tensor)
    alignment = values.get("general.alignment", 32)
    return Header(path, values, tuple(found), -(-place // alignment) * alignment)


def _stored(content: mmap, place: int) -> tuple[Stored, int]:
    name, place = _string(content, place)
    (dimensions,) = struct.unpack_from("<I", content, place)
    shape = f"<{dimensions}QIQ"
    *sizes, kind, offset = struct.unpack_from(shape, content, place + 4)
    return Stored(name, tuple(sizes), kind, offset), place + 4 + struct.calcsize(shape)


def _string(content: mmap, place: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", content, place)
    end = place + 8 + length
    if end > len(content):
        raise IndexError(end)
    return content[place + 8 : end].decode("utf-8"), end


def _value(content: mmap, place: int) -> tuple[Any, int]:
    """A value with its type before it, None for a list, and where the next thing begins."""
    (kind,) = struct.unpack_from("<I", content, place)
    place += 4
    if kind == _STRING:
        return _string(content, place)
    if kind == _ARRAY:
        return None, _end_of_list(content, place)
    form = f"<{_format(kind)}"
    return struct.unpack_from(form, content, place)[0], place + struct.calcsize(form)


def _end_of_list(content: mmap, place: int) -> int:
    kind, count = struct.unpack_from("<IQ", content, place)
    place += struct.calcsize("<IQ")
    if kind != _STRING:
        return int(place + count * struct.calcsize(f"<{_format(kind)}"))
    for _ in range(count):
        place = _string(content, place)[1]
    return place


def _format(kind: int) -> str:
    if kind not in _FORMATS:
        raise IndexError(kind)
    return _FORMATS[kind]


@cache
def _digest(path: str, size: int, changed: int) -> str:
    """SHA-256 of a file, which is the same one as long as size and time of its last change are."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(file: Path, cache_folder: Path) -> Path:
    """The folder in the cache that holds a file's model, under the name that the file had."""
    status = os.stat(file)
    digest = _digest(str(file.absolute()), status.st_size, status.st_mtime_ns)
    return cache_folder / "gguf" / digest[:_DIGITS_OF_A_KEY]


def _kept(place: Path) -> Path | None:
    return next((path for path in sorted(place.glob("[!.]*")) if path.is_dir()), None)


@contextmanager
def _alone_in(place: Path, console: Console, file: Path) -> Iterator[None]:
    """Holds a lock, which the system releases even where the process is killed."""
    lock = FileLock(place / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(console, f"Another process is converting {file}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _refuse_without_room(file: Path, place: Path, size: int) -> None:
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(
            f"model {str(file)!r} takes {in_bytes(size)} in float32 and {str(place)!r} has {in_bytes(free)} left; "
            "make room there, or name a folder on another disk by MOE_BIAS_CACHE"
        )


def _checked(file: Path) -> Header:
    """The header of a file whose data are all there and of types that can be read; raises UserError elsewhere."""
    need("gguf", "reading a GGUF file")
    header = read_header(file)
    if header.values.get("split.count", 1) > 1:
        raise UserError(
            f"model {str(file)!r} is one of {header.values['split.count']} parts of a split GGUF file, which "
            "transformers does not read; join them with llama.cpp: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    size = os.stat(file).st_size
    blocks = {kind: _block(header, kind) for kind in dict.fromkeys(tensor.kind for tensor in header.tensors)}
    end = header.data
    for tensor in header.tensors:
        weights, block = blocks[tensor.kind]
        end = max(end, header.data + tensor.offset + prod(tensor.sizes) // weights * block)
    if end > size:
        raise UserError(
            f"model {str(file)!r} is cut off: it has {size:,} bytes, and its tensors end at {end:,}; fetch it anew"
        )
    return header


def _block(header: Header, kind: int) -> tuple[int, int]:
    """How many weights of a type stand together, in how many bytes. Raises UserError where they cannot be read."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType(kind))
    except (KeyError, ValueError, NotImplementedError) as error:
        raise _unreadable_type(header, kind) from error
    return int(weights), int(size)


def _unreadable_type(header: Header, kind: int) -> UserError:
    from gguf import GGMLQuantizationType

    known = {int(member): member.name for member in GGMLQuantizationType}
    named = f"{known[kind]} (GGML's type {kind})" if kind in known else f"GGML's type {kind}"
    first = next(tensor.name for tensor in header.tensors if tensor.kind == kind)
    return UserError(
        f"model {str(header.path)!r} has tensors of {named}, the first of them {first!r}, which cannot be dequantised; "
        "take the model in another quantisation, such as Q4_K_M or Q8_0"
    )


def _refused(header: Header, error: Exception) -> UserError:
    """What a user is told where transformers makes no model of the file."""
    unsupported = _UNSUPPORTED.search(str(error))
    if unsupported is not None:
        return _unreadable_type(header, int(unsupported[1]))
    architecture = shown(header.values.get("general.architecture"))
    return UserError(
        f"model {str(header.path)!r}: transformers {version('transformers')} cannot read a GGUF file of architecture "
        f"{architecture} ({reason_of(error)}); name a folder with the model's safetensors files"
    )
