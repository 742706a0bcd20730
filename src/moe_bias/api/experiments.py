"""Comparisons that train what they compare, from Python and for the commands `arms`, `sweep` and `compare`.

Every arm is trained with each seed and measured on the same held-out tokens or problems. Arms that have a record in the
folder are not run again, so that an interrupted comparison goes on, and seeds can be added to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_bias.api.arguments import config_of, refuse_other_base
from moe_bias.api.data import refuse_other_data
from moe_bias.api.reports import ArmsReport, CompareReport
from moe_bias.api.rewarded import REWARD_ALONE, reward_record
from moe_bias.api.run_place import folder_of
from moe_bias.api.supervised import Trained, on_own_support
from moe_bias.config import ArmsConfig, CompareConfig, RewardConfig, SFTConfig
from moe_bias.experiments.arm import ArmRecords, Outcome, Wanted
from moe_bias.experiments.arms import LORA_ARMS, MAIN
from moe_bias.experiments.cells import Cell, compare_cells
from moe_bias.experiments.grid import find_cell, parse_grid, with_changes
from moe_bias.experiments.policy_arms import ARMS, BASE, PolicyArm, chosen_arms, compare_policies, mean_curve
from moe_bias.experiments.rewarded import Shifted, Stage, prepare_stage, refuse_unfit_lora
from moe_bias.experiments.supervised import Workshop, cells_of_grid, supervised_arms
from moe_bias.features.manifest import recipe_hash
from moe_bias.frozen import Frozen
from moe_bias.mistakes import UserError
from moe_bias.progress import say, text_console
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.rewards import Rewards
from moe_bias.tasks.task import Task
from moe_bias.training.data import Data
from moe_bias.training.problems import TaskData, rewards_of, task_data
from moe_bias.training.run_folder import begin, refuse_other_settings
from moe_bias.training.sft import refuse_impossible

TABLE_FILE = "table.json"
ADAPTERS = "adapters"
"""Folder of the adapters that arms trained by rewards leave beside their records."""
SEEDS = (0, 1, 2)
Axes = str | Mapping[str, Sequence[Any]]
"""Fields of `SFTConfig` with the values of each, as in `{"num_experts": [4, 16]}` or "num_experts=4,16"."""


def arms(
    base: Frozen,
    data: Data,
    config: ArmsConfig | None = None,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    lora: bool = True,
    batch_size: int = 16,
    output: str | Path | None = None,
) -> ArmsReport:
    """Trains MoE-Bias, parts of it left out, and LoRA on the same tokens, and compares them in pairs.

    `arms` are run besides "moe-bias", such as "static" and "free"; all of them where none is named. LoRA takes by far
    the longest: `lora` says whether its arms on all linear layers are run too, which data of a feature store alone does
    without; `batch_size` examples are measured at a time under it. Each arm is trained with each of the `seeds`. In
    `output` every arm leaves its record, and the same call runs those that are missing; without it nothing stays.

    Raises UserError on arms that there are not, on data of another model or of pairs, on a config that cannot be, and
    where `output` holds arms of other settings; Interrupted on Ctrl-C, saying how many are done.
    """
    config = _config(base, data, config_of(config, ArmsConfig))
    if lora and data.corpus is None:
        say(text_console(), f"{' and '.join(LORA_ARMS)} are left out: they need the texts, not a feature store alone")
    with folder_of(output, "arms") as folder:
        has_lora = lora and data.corpus is not None
        return compared_arms(config, _made_with(config, data), arms, seeds, folder, lambda: data, has_lora, batch_size)


def sweep(
    base: Frozen,
    data: Data,
    grid: Axes,
    config: SFTConfig | None = None,
    *,
    against: str = "",
    seeds: Sequence[int] = SEEDS,
    output: str | Path | None = None,
) -> ArmsReport:
    """Trains one layer for each cell of a grid on the same hidden states, and compares them in pairs.

    `grid` has fields of `SFTConfig` with the values of each, such as `{"num_experts": [4, 16]}`; cells that name a
    `support` are trained on that one. `against` is the cell to compare with, such as "num_experts=4" (""; the first).
    Each cell is trained with each of the `seeds`. In `output` every cell leaves its record, and the same call runs
    those that are missing; without it nothing stays.

    Raises UserError on a grid that cannot be, on data of another model or of pairs, and where `output` holds cells of
    other settings; Interrupted on Ctrl-C, saying how many are done.
    """
    config = _config(base, data, config_of(config, SFTConfig))
    with folder_of(output, "sweep") as folder:
        return swept(config, _made_with(config, data), _written(grid), against, seeds, folder, lambda: data)


def compare(
    base: Frozen,
    task: Task | str,
    config: CompareConfig | None = None,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    reward: Any = None,
    rewards: RewardConfig | None = None,
    train_problems: int = 600,
    test_problems: int = 200,
    shifted: Task | str | None = None,
    output: str | Path | None = None,
) -> CompareReport:
    """Trains MoE-Bias, parts of it left out, and LoRA by rewards on the same problems, and compares them in pairs.

    `arms` are those to run, such as "static" and "moe-bias"; all of them where none is named, those of LoRA by TRL.
    Each begins with a supervised phase on `warm_problems` worked answers, has the same problems, steps and samples, and
    is measured by its greedy answers to others; on those of a `shifted` task too, of which nothing is trained on. Each
    is trained with each of the `seeds`; `reward` and `rewards` are those of `train_rl`. In `output` every arm leaves
    its record and, in the folder `adapters` there, what it trained, for `evaluate` to measure further ("first-token"
    alone leaves none: an adapter acts on every token); the same call runs the arms that are missing. Without it nothing
    stays.

    Raises UserError on arms that there are not or that could not be run to their end, on a task with too few problems,
    on a reward that fails on a first sample, and where `output` holds arms of other settings; Interrupted on Ctrl-C,
    saying how many are done.
    """
    refuse_other_base(base)
    config, task = config_of(config, CompareConfig), make_task(task, {}, small=True)
    weighed = rewards_of(rewards or RewardConfig(**({} if reward is None else REWARD_ALONE)), reward)
    other = None if shifted is None else make_task(shifted, {}, small=True)

    def drawn() -> tuple[TaskData, Shifted | None]:
        problems = task.problems(train_problems + test_problems, 0)
        away = None if other is None else (other, other.problems(test_problems, 1))
        return task_data(base, task, problems, train_problems), away

    made_with = {
        **config.model_dump(mode="json"),
        "task": task.name,
        "shifted_task": None if other is None else other.name,
        "train_problems": train_problems,
        "test_problems": test_problems,
        **reward_record(reward, rewards),
    }
    with folder_of(output, "compare") as folder:
        return compared(config, made_with, arms, seeds, folder, drawn, weighed)


def compared_arms(
    config: ArmsConfig,
    made_with: Mapping[str, Any],
    names: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    opened: Callable[[], Data],
    lora: bool,
    batch_size: int,
) -> ArmsReport:
    """Runs the arms that have no record in the folder, and writes the table of all; `opened` gives the data then."""
    _refuse_others(folder, made_with, seeds)
    workshop = Workshop(config, folder, made_with, opened, batch_size)
    cells = workshop.records.run_missing(supervised_arms(workshop, config, names, seeds, lora))
    return _of_cells(made_with, cells, MAIN, folder)


def swept(
    config: SFTConfig,
    made_with: Mapping[str, Any],
    grid: str,
    against: str,
    seeds: Sequence[int],
    folder: Path,
    opened: Callable[[], Data],
) -> ArmsReport:
    """Runs the cells that have no record in the folder, and writes the table of all; `opened` gives the data then."""
    axes = parse_grid(grid)
    base = find_cell(against, axes)
    _refuse_others(folder, made_with, seeds)
    workshop = Workshop(config, folder, made_with, opened)
    cells = workshop.records.run_missing(cells_of_grid(workshop, config, axes, seeds))
    return _of_cells(made_with, cells, base, folder)


def compared(
    config: CompareConfig,
    made_with: Mapping[str, Any],
    names: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    drawn: Callable[[], tuple[TaskData, Shifted | None]],
    rewards: Rewards,
    console: Console | None = None,
) -> CompareReport:
    """Runs the arms that have no record in the folder, and writes the table of all that have one, earlier runs' too.

    `drawn` gives the problems, and those of another task, when they are needed.
    """
    chosen = chosen_arms(names)
    _refuse_others(folder, made_with, seeds)
    rewards.check_limit(config.max_new_tokens)
    console, records = console or text_console(), ArmRecords(folder, RecordKind.ARMS, PolicyArm)

    @cache
    def stage() -> Stage:
        begin(folder, made_with, {})
        refuse_unfit_lora(chosen, config)
        return prepare_stage(*drawn(), rewards, config, chosen, folder / ADAPTERS)

    def run(name: str, seed: int) -> Outcome[PolicyArm]:
        ready = stage()
        console.print(f"\n{name}, seed {seed}", style="bold")
        return ready.run(name, with_changes(config, {"seed": seed})), made_with

    wanted: Wanted[PolicyArm] = {
        (name, seed): partial(run, name, seed) for name in chosen for seed in ([0] if name == BASE else seeds)
    }
    records.run_missing(wanted)
    if rewards.failures.failures:
        say(console, str(rewards.failures))
    kept = records.all(ARMS)
    rows = compare_policies(kept)
    _write_table(folder, RecordKind.ARMS, made_with, {"rows": [asdict(row) for row in rows]})
    return CompareReport(rows, mean_curve(kept))


def _config(base: Frozen, data: Data, config: Trained) -> Trained:
    """The config on the data's support. Raises UserError where arms cannot be trained on the data."""
    refuse_other_base(base)
    refuse_other_data(data, base)
    if data.pairs:
        raise UserError("`data` holds pairs of a chosen and a rejected answer; arms are trained on plain answers")
    config = on_own_support(data, config)
    refuse_impossible(config, base.head, len(data.store))
    return config


def _written(grid: Axes) -> str:
    """The grid as text."""
    if isinstance(grid, str):
        return grid
    return " ".join(f"{name}={','.join(map(str, values))}" for name, values in grid.items())


def _made_with(config: SFTConfig, data: Data) -> dict[str, Any]:
    """What decides the arms' records: the config, and the data."""
    held_out = hashlib.sha256(json.dumps(data.held_out).encode()).hexdigest()
    return {
        **config.model_dump(mode="json"),
        "data": recipe_hash(data.store.manifest.recipe, {}),
        "held_out_rows": held_out,
    }


def _refuse_others(folder: Path, made_with: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Raises UserError where the folder's arms are of other settings, or no seed is given."""
    if not len(seeds):
        raise UserError("`seeds` is empty; give at least one")
    refuse_other_settings(folder, made_with)


def _of_cells(made_with: Mapping[str, Any], cells: Sequence[Cell], base: str, folder: Path) -> ArmsReport:
    rows = compare_cells(cells, base)
    content = {"base": base, "rows": [asdict(row) for row in rows]}
    _write_table(folder, RecordKind.CELLS, made_with, content)
    return ArmsReport(rows, base, round(sum(cells[0].tokens["all"])))


def _write_table(folder: Path, kind: RecordKind, settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    made_with = {"kind": kind, "settings": settings, "provenance": provenance()}
    write_json(folder / TABLE_FILE, made_with | dict(content))
