"""`moe-bias arms`: MoE-Bias, parts of it left out, and LoRA, trained and measured on the same tokens.

LoRA goes through the backbone, so it needs the texts: from a feature store alone it is left out.
"""

from __future__ import annotations

import itertools
from contextlib import closing
from functools import partial

from moe_bias.commands.cells import Outcome, Runner, Workshop, report, run_missing
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.training_settings import ArmsSettings
from moe_bias.experiments.arms import LAYER_ARMS, LORA_ARMS, LORA_HEAD, MAIN, MAIN_ON_LORA_TOKENS, run_lora
from moe_bias.experiments.cells import BASE_MODEL, CellRecords
from moe_bias.experiments.grid import with_changes
from moe_bias.experiments.lora import LoRAChoices
from moe_bias.mistakes import UserError
from moe_bias.progress import say
from moe_bias.training.run_folder import refuse_other_settings


def run(settings: ArmsSettings) -> None:
    """Runs the arms that have no record yet, and prints all of them against `moe-bias`.

    Raises UserError where the folder holds arms of other settings; Interrupted on Ctrl-C.
    """
    unknown = sorted({*settings.arms} - {*LAYER_ARMS, LORA_HEAD})
    if unknown:
        raise UserError(f"--arms names {unknown[0]!r}; choose among {', '.join((*LAYER_ARMS, LORA_HEAD))}")
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    console, records = report_console(), CellRecords(settings.output)
    if settings.lora and not settings.data:
        say(console, f"{' and '.join(LORA_ARMS)} are left out: they need the texts, which --data gives")
    with closing(Workshop(settings, console)) as workshop:
        cells = run_missing(records, _wanted(settings, workshop, records))
    report(console, settings, cells, MAIN)


def _wanted(settings: ArmsSettings, workshop: Workshop, records: CellRecords) -> dict[tuple[str, int], Runner]:
    """What runs each arm with each seed."""
    wanted: dict[tuple[str, int], Runner] = {(BASE_MODEL, 0): partial(workshop.base, settings)}
    chosen = {MAIN, *settings.arms} if settings.arms else {*LAYER_ARMS, LORA_HEAD}
    for name, seed in itertools.product(LAYER_ARMS, settings.seeds):
        if name in chosen:
            changes = LAYER_ARMS[name]
            wanted[name, seed] = partial(workshop.cell, name, with_changes(settings, {**changes, "seed": seed}))
    for seed in settings.seeds if LORA_HEAD in chosen else ():
        rate = {"expert_rate": settings.lora_head_rate, "router_rate": settings.lora_head_rate, "seed": seed}
        wanted[LORA_HEAD, seed] = partial(
            workshop.head_lora, LORA_HEAD, with_changes(settings, {**rate, "experts": "free"}), settings.lora_rank
        )
    if settings.lora_tokens is not None:
        for seed in settings.seeds:
            one = with_changes(settings, {"seed": seed})
            wanted[MAIN_ON_LORA_TOKENS, seed] = partial(
                workshop.cell_on_tokens, MAIN_ON_LORA_TOKENS, one, settings.lora_tokens
            )
    for name in LORA_ARMS if settings.lora and settings.data else ():
        for seed in settings.seeds:
            wanted[name, seed] = partial(_lora, workshop, records, name, seed, settings)
    return wanted


def _lora(workshop: Workshop, records: CellRecords, name: str, seed: int, settings: ArmsSettings) -> Outcome:
    data, main = workshop.data, records.load(MAIN, seed)
    assert main is not None, "the main arm is run first"
    train, held_out = data.examples()
    features = workshop.on(settings.support).held_out
    choices = LoRAChoices(settings.lora_rank, settings.lora_rate, settings.lora_batch_size)
    cell = run_lora(
        name, data.base.model, train, held_out, features, main, choices, settings.lora_tokens, settings.batch_size
    )
    return cell, settings.model_dump(mode="json")
