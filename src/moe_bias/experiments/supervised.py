"""What trains and measures the arms of a supervised comparison, and the cells of a sweep.

All are of one frozen model, on the same features. A cell may ask for another support than they were extracted on; see
`prepare_stored`. LoRA goes through the backbone, so it needs the texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from moe_bias.config import ArmsConfig, SFTConfig
from moe_bias.experiments.arm import ArmRecords, Outcome, Wanted
from moe_bias.experiments.arms import LAYER_ARMS, LORA_ARMS, LORA_HEAD, MAIN, MAIN_ON_LORA_TOKENS, run_lora
from moe_bias.experiments.cells import BASE_MODEL, Cell, base_cell, run_cell
from moe_bias.experiments.grid import cell_name, with_changes
from moe_bias.experiments.lora import HeadLoRA, LoRAChoices
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.source import Subset
from moe_bias.mistakes import UserError
from moe_bias.records import RecordKind
from moe_bias.training.data import Data
from moe_bias.training.run_folder import begin, digests
from moe_bias.training.sft import Prepared


class Workshop:
    """A folder of cells, and the model and features to make them from, had when they are first needed and only once.

    `config` is that of the cells but for what each changes, `made_with` says what the folder is of; `batch_size`
    examples are measured at a time under LoRA.
    """

    def __init__(
        self,
        config: SFTConfig,
        folder: Path,
        made_with: Mapping[str, Any],
        opened: Callable[[], Data],
        batch_size: int = 16,
    ) -> None:
        self.records = ArmRecords(folder, RecordKind.CELLS, Cell)
        self._config, self._opened, self._batch_size = config, opened, batch_size
        self._begin = partial(begin, folder, made_with)
        self._prepared: dict[str, Prepared] = {}
        self._logits: tuple[tuple[str, int], BaseLogits] | None = None

    @cached_property
    def data(self) -> Data:
        """Model and features; the folder is for these from then on."""
        config, data = self._config, self._opened()
        self._prepared[config.support] = prepared = data.on(config.support)
        self._begin(digests(prepared.train, prepared.held_out))
        return data

    def on(self, support: str) -> Prepared:
        """Features on a support, as the option names it."""
        data = self.data
        if support not in self._prepared:
            self._prepared[support] = data.on(support)
        return self._prepared[support]

    def base(self, config: SFTConfig) -> Outcome[Cell]:
        """The frozen model's cell."""
        return base_cell(self.on(config.support), self.data.base.head), config.model_dump(mode="json")

    def cell(self, name: str, config: SFTConfig) -> Outcome[Cell]:
        """A layer's cell."""
        prepared, logits = self.on(config.support), self._logits_on(config)
        return run_cell(name, config, prepared, self.data.base.head, logits), config.model_dump(mode="json")

    def head_lora(self, name: str, config: SFTConfig, rank: int) -> Outcome[Cell]:
        """The cell of LoRA on the output embedding alone, at one rate."""
        prepared, logits = self.on(config.support), self._logits_on(config)
        torch.manual_seed(config.seed)
        layer = HeadLoRA(self.data.base.head, rank, prepared.support)
        return run_cell(name, config, prepared, self.data.base.head, logits, layer), config.model_dump(mode="json")

    def cell_on_tokens(self, name: str, config: SFTConfig, tokens: int) -> Outcome[Cell]:
        """A layer's cell on so many training tokens: the first of them once, or all as many times as that gives."""
        prepared = self.on(config.support)
        count = min(tokens, len(prepared.train))
        part = replace(
            prepared,
            train=Subset(prepared.train, torch.arange(count)),
            seconds=prepared.seconds * count / len(prepared.train),
        )
        config = config.model_copy(update={"epochs": tokens // count})
        logits = BaseLogits(part.train, self.data.base.head, config.logits_budget)
        return run_cell(name, config, part, self.data.base.head, logits), config.model_dump(mode="json")

    def lora(self, name: str, seed: int, config: ArmsConfig) -> Outcome[Cell]:
        """The cell of LoRA on all linear layers, with the budget that the main arm of this seed gives it."""
        data, main = self.data, self.records.load(MAIN, seed)
        assert main is not None, "the main arm is run first"
        train, held_out = data.examples()
        features = self.on(config.support).held_out
        choices = LoRAChoices(config.lora_rank, config.lora_rate, config.lora_batch_size)
        cell = run_lora(
            name, data.base.model, train, held_out, features, main, choices, config.lora_tokens, self._batch_size
        )
        return cell, config.model_dump(mode="json")

    def _logits_on(self, config: SFTConfig) -> BaseLogits:
        """Base logits of the training tokens; those of the last support are kept, since many cells share them."""
        asked = (config.support, int(config.logits_budget))
        if self._logits is None or self._logits[0] != asked:
            self._logits = None  # before the others are made: both together may not fit
            self._logits = (asked, BaseLogits(self.on(config.support).train, self.data.base.head, asked[1]))
        return self._logits[1]


def cells_of_grid(
    workshop: Workshop, config: SFTConfig, grid: Sequence[Mapping[str, str]], seeds: Sequence[int]
) -> Wanted[Cell]:
    """What runs the cells of a grid with each seed. Raises UserError on values that cannot be."""
    variants = {cell_name(cell): with_changes(config, cell) for cell in grid}
    return {(BASE_MODEL, 0): partial(workshop.base, config)} | {
        (name, seed): partial(workshop.cell, name, with_changes(variant, {"seed": seed}))
        for name, variant in variants.items()
        for seed in seeds
    }


def supervised_arms(
    workshop: Workshop, config: ArmsConfig, names: Sequence[str], seeds: Sequence[int], lora: bool
) -> Wanted[Cell]:
    """What runs each arm with each seed: those of these names and the main one, or all; LoRA on the texts if asked to.

    Raises UserError on a name that none has.
    """
    unknown = sorted({*names} - {*LAYER_ARMS, LORA_HEAD})
    if unknown:
        raise UserError(f"`arms` names {unknown[0]!r}; choose among {', '.join((*LAYER_ARMS, LORA_HEAD))}")
    wanted = {(BASE_MODEL, 0): partial(workshop.base, config)}
    chosen = {MAIN, *names} if names else {*LAYER_ARMS, LORA_HEAD}
    for name, seed in itertools.product(LAYER_ARMS, seeds):
        if name in chosen:
            changed = with_changes(config, {**LAYER_ARMS[name], "seed": seed})
            wanted[name, seed] = partial(workshop.cell, name, changed)
    for seed in seeds if LORA_HEAD in chosen else ():
        rates = {"expert_rate": config.lora_head_rate, "router_rate": config.lora_head_rate}
        changed = with_changes(config, {**rates, "seed": seed, "experts": "free"})
        wanted[LORA_HEAD, seed] = partial(workshop.head_lora, LORA_HEAD, changed, config.lora_rank)
    if config.lora_tokens is not None:
        for seed in seeds:
            one, run = with_changes(config, {"seed": seed}), partial(workshop.cell_on_tokens, MAIN_ON_LORA_TOKENS)
            wanted[MAIN_ON_LORA_TOKENS, seed] = partial(run, one, config.lora_tokens)
    for name, seed in itertools.product(LORA_ARMS if lora else (), seeds):
        wanted[name, seed] = partial(workshop.lora, name, seed, config)
    return wanted
