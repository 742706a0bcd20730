"""Records of runs: JSON files that appear whole, and say what they were made with."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_UNFINISHED, _TEMPORARY = ".moe-bias-unfinished-", ".moe-bias-temporary-"
"""Stand between the name of what is being made, or of a folder for a while, and its machine and process."""
_ABANDONED_SECONDS = 24 * 3600.0
"""Nothing is unfinished for as long."""
_STARTED = time.time()
_CLOCKS_SECONDS = 60.0
"""The clock of a file server may be so far from this machine's."""
_FIRST_NAMESPACE = "pid:[4026531836]"
"""What Linux calls the numbers of processes outside containers."""


class RecordKind(StrEnum):
    """What left a record, which says so under `kind`; those of before it was said are told by their keys."""

    SUPERVISED = "train sft"
    POLICY = "train rl"
    CELLS = "sweep or arms"
    ARMS = "compare"
    EVALUATION = "eval"
    ANALYSIS = "analyze"
    DEMO = "demo"
    INSPECTION = "inspect-text"
    LABELS = "labels"
    HEADROOM = "headroom"
    DRAFT = "train draft"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file beside its place and moves it there, so that no half of it is ever seen."""
    write_whole(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """The file with this content, or as it was before: not even a power cut leaves a half.

    Raises OSError, after removing what it wrote, where the disk does not take it all.
    """
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """As `write_whole`, of content that comes in parts; the file may be read for them meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as beside:
        with beside.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    _sync_folder(path.parent)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A name beside `path` to make it under, file or folder, until the block moves it there; else it is removed.

    What killed processes have left under such names in the same folder is removed first.
    """
    with _own_name(path, _UNFINISHED) as beside:
        yield beside


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end of the block, unless another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as beside:
        beside.mkdir()
        yield beside
        try:
            beside.rename(path)
        except OSError:
            if not path.is_dir():
                raise


@contextmanager
def temporary_folder(purpose: str, within: Path | None = None) -> Iterator[Path]:
    """A folder of this process alone, in the system's place for such things; what killed processes left goes."""
    with _own_name((within or Path(tempfile.gettempdir())) / purpose, _TEMPORARY) as folder:
        folder.mkdir(mode=0o700)
        yield folder


@contextmanager
def _own_name(path: Path, mark: str) -> Iterator[Path]:
    remove_left_overs(path.parent)
    own = path.with_name(f".{path.name}{mark}{machine_name()}-{os.getpid()}")
    _remove(own)
    try:
        yield own
    finally:
        _remove(own)


def remove_left_overs(folder: Path) -> None:
    """Removes what killed processes had begun to make in the folder, and their temporary folders.

    Only names of `unfinished` and `temporary_folder` count, and of those none that a living process may still use:
    on this machine that is known; what is of another one goes after a day if it is unfinished, and else stays.
    """
    for mark in (_UNFINISHED, _TEMPORARY):
        for left in folder.glob(f".*{mark}*"):
            if _is_abandoned(left, mark):
                _remove(left)


@cache
def machine_name() -> str:
    """The name of this machine, or of the container in it that numbers its own processes."""
    name = platform.node()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        name += "" if namespace == _FIRST_NAMESPACE else namespace
    return re.sub(r"[^A-Za-z0-9]+", "_", name)[-48:]


def _is_abandoned(left: Path, mark: str) -> bool:
    machine, _, process = left.name.rpartition(mark)[2].rpartition("-")
    if not process.isdecimal():
        return False
    try:
        changed = left.lstat().st_mtime
    except OSError:
        return False  # it is gone already
    if machine != machine_name() or os.name == "nt":
        return mark == _UNFINISHED and time.time() - changed > _ABANDONED_SECONDS
    if int(process) == os.getpid():  # in a container each run may have the same number
        return _STARTED - changed > _CLOCKS_SECONDS
    return not _is_alive(int(process))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    """File or folder, whatever there is of it; what this user may not remove stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, PermissionError):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a rename last; Windows opens no folders and needs none of this."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def provenance() -> dict[str, Any]:
    """Versions, machine and source revision of this run."""
    packages = ("moe-bias", "torch", "transformers", "peft")
    return {
        "versions": {name: version(name) for name in packages},
        "machine": machine(),
        "revision": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def machine() -> dict[str, Any]:
    """The processor by its own name, cores and threads, and the accelerator where there is one."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "python": platform.python_version(),
    }


def peak_bytes(device: torch.device) -> int:
    """The most memory until now: on a GPU what was allocated, on a CPU what the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    """What git says of the sources that this package runs from, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
