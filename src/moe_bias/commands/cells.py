"""What `sweep` and `arms` share: features on any support from one feature store, and cells run once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from rich.console import Console

from moe_bias.api.data import Data
from moe_bias.commands.cell_table import print_cells
from moe_bias.commands.material import opened
from moe_bias.commands.training_settings import ArmsSettings, SweepSettings
from moe_bias.config import SFTConfig
from moe_bias.experiments.cells import Cell, CellRecords, base_cell, compare_cells, run_cell
from moe_bias.experiments.lora import HeadLoRA
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.source import Subset
from moe_bias.mistakes import Interrupted
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.training.run_folder import begin, digests
from moe_bias.training.sft import Prepared

TABLE_FILE = "table.json"
Outcome = tuple[Cell, Mapping[str, Any]]
"""A cell, and the settings that it was run with."""
Runner = Callable[[], Outcome]


class Workshop:
    """The frozen model and its features, made when they are first asked for and only once; close it after use."""

    def __init__(self, settings: SweepSettings | ArmsSettings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._prepared: dict[str, Prepared] = {}
        self._logits: tuple[tuple[str, int], BaseLogits] | None = None
        self._resources = ExitStack()

    def close(self) -> None:
        """Removes features that are not to be kept."""
        self._resources.close()

    @cached_property
    def data(self) -> Data:
        """Model and features; the folder is for these from then on."""
        settings = self._settings
        data = self._resources.enter_context(opened(settings, self._console))
        self._prepared[settings.support] = prepared = data.on(settings.support)
        begin(settings.output, settings.model_dump(mode="json"), digests(prepared.train, prepared.held_out))
        return data

    def on(self, support: str) -> Prepared:
        """Features on a support, as the option names it."""
        data = self.data
        if support not in self._prepared:
            self._prepared[support] = data.on(support)
        return self._prepared[support]

    def base(self, settings: SFTConfig) -> Outcome:
        """The frozen model's cell."""
        return base_cell(self.on(settings.support), self.data.base.head), settings.model_dump(mode="json")

    def cell(self, name: str, settings: SFTConfig) -> Outcome:
        """A layer's cell."""
        prepared, logits = self.on(settings.support), self._logits_on(settings)
        cell = run_cell(name, settings, prepared, self.data.base.head, logits)
        return cell, settings.model_dump(mode="json")

    def head_lora(self, name: str, settings: SFTConfig, rank: int) -> Outcome:
        """The cell of LoRA on the output embedding alone, at one rate."""
        prepared, logits = self.on(settings.support), self._logits_on(settings)
        torch.manual_seed(settings.seed)
        layer = HeadLoRA(self.data.base.head, rank, prepared.support)
        return run_cell(name, settings, prepared, self.data.base.head, logits, layer), settings.model_dump(mode="json")

    def cell_on_tokens(self, name: str, settings: SFTConfig, tokens: int) -> Outcome:
        """A layer's cell on so many training tokens: the first of them once, or all as many times as that gives."""
        prepared = self.on(settings.support)
        count = min(tokens, len(prepared.train))
        part = replace(
            prepared,
            train=Subset(prepared.train, torch.arange(count)),
            seconds=prepared.seconds * count / len(prepared.train),
        )
        settings = settings.model_copy(update={"epochs": tokens // count})
        logits = BaseLogits(part.train, self.data.base.head, settings.logits_budget)
        return run_cell(name, settings, part, self.data.base.head, logits), settings.model_dump(mode="json")

    def _logits_on(self, settings: SFTConfig) -> BaseLogits:
        """Base logits of the training tokens; those of the last support are kept, since many cells share them."""
        asked = (settings.support, int(settings.logits_budget))
        if self._logits is None or self._logits[0] != asked:
            self._logits = None  # before the others are made: both together may not fit
            self._logits = (asked, BaseLogits(self.on(settings.support).train, self.data.base.head, asked[1]))
        return self._logits[1]


def run_missing(records: CellRecords, wanted: Mapping[tuple[str, int], Runner]) -> list[Cell]:
    """Runs the cells, by name and seed, that have no record, each kept as soon as it is done; returns all.

    Raises Interrupted on Ctrl-C, saying how many are done, or how much is extracted.
    """
    try:
        for (name, seed), runner in wanted.items():
            if records.load(name, seed) is None:
                records.save(*runner())
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:
        done = sum(records.load(name, seed) is not None for name, seed in wanted)
        raise Interrupted(
            f"{done} of {len(wanted)} are done and kept in {records.folder}; run the same command again for the others"
        ) from interrupt
    found = [records.load(name, seed) for name, seed in wanted]
    return [cell for cell in found if cell is not None]


def report(console: Console, settings: SweepSettings | ArmsSettings, cells: Sequence[Cell], base: str) -> None:
    """Prints the table and writes it into the output folder."""
    rows = compare_cells(cells, base)
    content = {"kind": RecordKind.CELLS, "base": base, "rows": [asdict(row) for row in rows]}
    made_with = {"settings": settings.model_dump(mode="json"), "provenance": provenance()}
    write_json(settings.output / TABLE_FILE, content | made_with)
    print_cells(console, rows, base, round(sum(cells[0].tokens["all"])))
    console.print(f"Records and {TABLE_FILE} are in {settings.output}.")
