"""What an engine tells the processes that take its requests: a sample of its model's output embedding, hidden states.

Requests are refused where they come in, in a process that has no model: once a request is in the engine,
nothing that is wrong with its adapter can be told to its client alone. vLLM starts its processes from one, so
a folder that is made there, and named in the environment, is known to all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from vllm.config import ModelConfig

from moe_bias.serving.recording import RowLayout, Spool
from moe_bias.variables import NOTES

_KEPT = "kept"


def share_notes() -> None:
    """Makes the folder for this process and those that it starts, where it was not made by one that started this."""
    if _shared() is None:
        os.environ[NOTES] = _folder().name


def note_sample(model_config: ModelConfig, sample: Tensor) -> None:
    """Tells the sample of an engine's output embedding."""
    note = _note(model_config)
    if note is not None:
        beside = note.with_suffix(f".{os.getpid()}")  # every rank writes the same
        beside.write_text(json.dumps(sample.tolist()))
        beside.replace(note)


def noted_sample(model_config: ModelConfig) -> Tensor | None:
    """The sample, where it was told: engines on other machines cannot."""
    note = _note(model_config)
    return torch.tensor(json.loads(note.read_text())) if note is not None and note.exists() else None


def share_kept_states() -> None:
    """Makes the folder of hidden states that are kept for learning: where it is, an engine keeps them."""
    share_notes()
    folder = _shared()
    assert folder is not None
    (folder / _KEPT).mkdir(exist_ok=True)


def kept_states(layout: RowLayout) -> Spool | None:
    """That folder; None where nothing learns."""
    folder = _shared()
    return None if folder is None or not (folder / _KEPT).is_dir() else Spool(folder / _KEPT, layout)


def _note(model_config: ModelConfig) -> Path | None:
    folder = _shared()
    model = (model_config.model, model_config.revision, model_config.quantization, str(model_config.dtype))
    return None if folder is None else folder / hashlib.sha256(repr(model).encode()).hexdigest()


def _shared() -> Path | None:
    """The folder, where there is one: the process that made it may have ended."""
    named = os.environ.get(NOTES)
    return Path(named) if named and Path(named).is_dir() else None


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """The folder goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="moe-bias-notes-")
