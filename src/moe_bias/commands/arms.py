"""`moe-bias arms`: MoE-Bias, parts of it left out, and LoRA, trained and measured on the same tokens."""

from __future__ import annotations

from contextlib import ExitStack

from moe_bias.api.experiments import TABLE_FILE, compared_arms
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.material import opened
from moe_bias.commands.training_settings import ArmsSettings
from moe_bias.experiments.arms import LORA_ARMS
from moe_bias.progress import say
from moe_bias.report.terminal import terminal_table


def run(settings: ArmsSettings) -> None:
    """Runs the arms that have no record yet, and prints all of them against `moe-bias`.

    Raises UserError where the folder holds arms of other settings; Interrupted on Ctrl-C.
    """
    console = report_console()
    if settings.lora and not settings.data:
        say(console, f"{' and '.join(LORA_ARMS)} are left out: they need the texts, which --data gives")
    with ExitStack() as open_data:
        report = compared_arms(
            settings,
            settings.model_dump(mode="json"),
            settings.arms,
            settings.seeds,
            settings.output,
            lambda: open_data.enter_context(opened(settings, console)),
            settings.lora and bool(settings.data),
            settings.batch_size,
        )
    for table in report.tables:
        console.print(terminal_table(table))
    console.print(f"Records and {TABLE_FILE} are in {settings.output}.")
