"""What `--dry-run` knows of a model before a run, and how it is said: its sizes, what is held, the memory there is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from moe_bias.config import LayerConfig, ModelConfig
from moe_bias.frozen import Frozen, frozen, load_tokenizer, model_config, place_of
from moe_bias.limits import in_bytes
from moe_bias.mistakes import UserError
from moe_bias.progress import say
from moe_bias.training.budget import Held, Memory, ModelSize, memories, memory_of, peak

UNKNOWN_PROMPT = 512
"""Tokens that the longest prompt is taken to have where the model is not there to tell."""


@dataclass(frozen=True)
class Subject:
    """A model's config and sizes, where it would be, and the model itself; or why it is not there."""

    settings: ModelConfig
    config: Any
    size: ModelSize
    device: torch.device
    base: Frozen | None
    reason: str

    @classmethod
    def of(cls, settings: ModelConfig) -> Subject:
        """Loads the model where there is room for it. Raises UserError where not even the config can be had."""
        config = model_config(settings)
        device, dtype = place_of(settings, config)
        size = ModelSize.of(config, dtype, settings.trust_remote_code)
        there, base, reason = memory_of(device), None, ""
        if there is not None and size.weights > there:
            reason = f"its weights take {in_bytes(size.weights)} of {in_bytes(there)}"
        else:
            try:
                base = frozen(settings)
            except UserError as error:
                reason = str(error)
        return cls(settings, config, size, device, base, reason)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, without which no text can be counted. Raises UserError where there is none."""
        return load_tokenizer(self.settings) if self.base is None else self.base.tokenizer


def say_model(console: Console, subject: Subject, layer: LayerConfig | None) -> None:
    """Its parameters, where it is, and what is trained beside them."""
    size = subject.size
    dtype = str(size.dtype).removeprefix("torch.")
    sentence = f"{subject.settings.model}: {size.parameters:,} parameters in {dtype} on {subject.device}"
    if layer is not None:
        trainable = layer.num_parameters(size.hidden_size, size.vocab_size)
        sentence += f"; {trainable:,} trainable, {trainable / size.parameters:.3%} of them"
    say(console, f"{sentence}.")


def say_untried(console: Console, subject: Subject) -> None:
    """Why there are no hours."""
    say(console, f"The model is not tried, so that no hours are expected: {subject.reason}.")


def say_held(console: Console, held: Sequence[Held], device: torch.device, folder: Path | None) -> None:
    """One thing after the other, and what is held at one time against the memory and the disk that there are."""
    table = Table("holds at least", "bytes", "where", "while", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for one in held:
        if one.bytes:
            place = device.type if one.place == "device" else one.place
            table.add_row(one.what, in_bytes(one.bytes), place, "" if one.phase == "always" else one.phase)
    console.print(table)
    there = memories(device)
    if folder is not None:
        there.append(Memory(("disk",), f"the disk of {folder}", _free_beside(folder)))
    for memory in there:
        needed = peak(held, memory.places)
        if needed and memory.bytes is not None:
            verdict = "" if needed <= memory.bytes else ", which does not fit"
            say(console, f"At one time {in_bytes(needed)} of {in_bytes(memory.bytes)} in {memory.name}{verdict}.")


def _free_beside(folder: Path) -> int:
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
