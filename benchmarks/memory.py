"""Peak memory of a piece of work, each in a process of its own, so that none sees what another one held.

On an accelerator it is that device's memory, else the process's own, read from Linux's /proc.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Peak:
    """MiB at the height of the work: of everything that is held, and above what was held before it."""

    whole: float
    above: float


def print_peak(work: Callable[[], object]) -> None:
    """Does the work and prints what `peak_in_own_process` reads; what came before it does not count."""
    print(json.dumps(vars(_of_device(work) if torch.cuda.is_available() else _of_process(work))))


def peak_in_own_process(script: str, words: Mapping[str, object]) -> Peak:
    """What the script prints by `print_peak` when it is run with these options; None leaves one out."""
    given = [f"--{option}={value}" for option, value in words.items() if value is not None]
    done = subprocess.run([sys.executable, script, *given], stdout=subprocess.PIPE, text=True, check=True)
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _of_device(work: Callable[[], object]) -> Peak:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    height = torch.cuda.max_memory_allocated()
    return Peak(height / 2**20, (height - before) / 2**20)


def _of_process(work: Callable[[], object]) -> Peak:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's word for: the peak starts anew from what is resident
    before = _status("VmRSS")
    work()
    height = _status("VmHWM")
    return Peak(height / 2**10, (height - before) / 2**10)


def _status(name: str) -> int:
    """KiB, as Linux counts them."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])
