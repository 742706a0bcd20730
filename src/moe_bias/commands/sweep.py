"""`moe-bias sweep`: a layer per cell of a grid, on hidden states extracted once, and the table of them."""

from __future__ import annotations

from contextlib import ExitStack

from moe_bias.api.experiments import TABLE_FILE, swept
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.material import opened
from moe_bias.commands.training_settings import SweepSettings
from moe_bias.report.terminal import terminal_table


def run(settings: SweepSettings) -> None:
    """Runs the cells that have no record yet, and prints all of them against the base cell.

    Raises UserError on a grid that cannot be, before anything is loaded, and where the folder holds
    cells of other settings; Interrupted on Ctrl-C.
    """
    console = report_console()
    with ExitStack() as open_data:
        report = swept(
            settings,
            settings.model_dump(mode="json"),
            settings.grid,
            settings.base,
            settings.seeds,
            settings.output,
            lambda: open_data.enter_context(opened(settings, console)),
        )
    for table in report.tables:
        console.print(terminal_table(table))
    console.print(f"Records and {TABLE_FILE} are in {settings.output}.")
