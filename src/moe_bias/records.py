"""Records of runs: JSON files that appear whole, and say what they were made with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


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
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
