"""`moe-bias compare`: the arms of reinforcement learning on one task, each run once per seed, and the table."""

from __future__ import annotations

from moe_bias.api.experiments import TABLE_FILE, compared
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.training_settings import CompareSettings
from moe_bias.experiments.rewarded import Shifted
from moe_bias.report.terminal import terminal_table
from moe_bias.training.problems import TaskData, prepare_task, rewards_of, task_of


def run(settings: CompareSettings) -> None:
    """Runs the arms that have no record yet, and prints all that have one, those of earlier runs in the folder too.

    Raises UserError on arms that there are not, settings that cannot be used, and where the folder holds
    arms of other settings; Interrupted on Ctrl-C, saying how many are done.
    """

    def drawn() -> tuple[TaskData, Shifted | None]:
        shifted = shifted_of(settings)
        return prepare_task(settings, settings, seed=0), shifted

    console, rewards = report_console(), rewards_of(settings)
    made_with = settings.model_dump(mode="json")
    report = compared(settings, made_with, settings.arms, settings.seeds, settings.output, drawn, rewards, console)
    for table in report.tables:
        console.print(terminal_table(table, stacked=True))
    console.print(f"Records and {TABLE_FILE} are in {settings.output}.")


def shifted_of(settings: CompareSettings) -> Shifted | None:
    """The task that nothing is trained on, and its problems. Raises UserError where there are none."""
    if not (settings.shifted_task or settings.shifted_options):
        return None
    options = {**settings.task_options, **settings.shifted_options}
    name = settings.shifted_task or settings.task
    shifted = task_of(settings.model_copy(update={"task": name, "task_options": options, "problems": ""}))
    return shifted, shifted.problems(settings.test_problems, seed=1)
