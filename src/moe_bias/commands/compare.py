"""`moe-bias compare`: the arms of reinforcement learning on one task, each run once per seed, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from moe_bias.api.policy import rewards_of
from moe_bias.commands.compare_arms import prepare_stage
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.policy_table import print_policies
from moe_bias.commands.training_settings import CompareSettings
from moe_bias.experiments.grid import with_changes
from moe_bias.experiments.policy_arms import ARMS, BASE, PolicyArm, PolicyRecords, compare_policies
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.training.run_folder import begin, refuse_other_settings

TABLE_FILE = "table.json"


def run(settings: CompareSettings) -> None:
    """Runs the arms that have no record yet, and prints all that have one, those of earlier runs in the folder too.

    Raises UserError on arms that there are not, settings that cannot be used, and where the folder holds
    arms of other settings; Interrupted on Ctrl-C, saying how many are done.
    """
    names = _names(settings)
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    rewards_of(settings)
    console, records = report_console(), PolicyRecords(settings.output)
    wanted = [(name, seed) for name in names for seed in ([0] if name == BASE else settings.seeds)]
    try:
        if any(records.load(*each) is None for each in wanted):
            begin(settings.output, settings.model_dump(mode="json"), {})
            stage = prepare_stage(settings, names)
            for name, seed in wanted:
                if records.load(name, seed) is None:
                    console.print(f"\n{name}, seed {seed}", style="bold")
                    arm = stage.run(name, with_changes(settings, {"seed": seed}))
                    records.save(arm, settings.model_dump(mode="json"))
    except KeyboardInterrupt as interrupt:
        count = sum(records.load(*each) is not None for each in wanted)
        raise Interrupted(
            f"{count} of {len(wanted)} are done and kept in {records.folder}; run the same command again for the others"
        ) from interrupt
    _report(console, settings, records.all())


def _names(settings: CompareSettings) -> list[str]:
    for name in settings.arms:
        if name not in ARMS:
            raise UserError(f"--arms has {name!r}, which is none of {', '.join(ARMS)}")
    return [name for name in ARMS if not settings.arms or name in settings.arms]


def _report(console: Console, settings: CompareSettings, arms: Sequence[PolicyArm]) -> None:
    rows = compare_policies(arms)
    write_json(
        settings.output / TABLE_FILE,
        {
            "kind": RecordKind.ARMS,
            "settings": settings.model_dump(mode="json"),
            "provenance": provenance(),
            "rows": [asdict(row) for row in rows],
        },
    )
    print_policies(console, rows)
    console.print(f"Records and {TABLE_FILE} are in {settings.output}.")
