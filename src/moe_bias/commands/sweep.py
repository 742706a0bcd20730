"""`moe-bias sweep`: a layer per cell of a grid, on hidden states extracted once, and the table of them.

A cell may ask for another support than the features were extracted on; see `prepare_stored`.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

from moe_bias.commands.cells import Runner, Workshop, report, run_missing
from moe_bias.commands.demo_report import report_console
from moe_bias.commands.training_settings import SweepSettings
from moe_bias.experiments.cells import BASE_MODEL, CellRecords
from moe_bias.experiments.grid import cell_name, find_cell, parse_grid, with_changes
from moe_bias.training.run_folder import refuse_other_settings


def run(settings: SweepSettings) -> None:
    """Runs the cells that have no record yet, and prints all of them against the base cell.

    Raises UserError on a grid that cannot be, before anything is loaded, and where the folder holds
    cells of other settings; Interrupted on Ctrl-C.
    """
    grid = parse_grid(settings.grid)
    base = find_cell(settings.base, grid)
    variants = {cell_name(cell): with_changes(settings, cell) for cell in grid}
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    console = report_console()
    with closing(Workshop(settings, console)) as workshop:
        wanted: dict[tuple[str, int], Runner] = {(BASE_MODEL, 0): partial(workshop.base, settings)}
        for name, variant in variants.items():
            for seed in settings.seeds:
                wanted[name, seed] = partial(workshop.cell, name, with_changes(variant, {"seed": seed}))
        cells = run_missing(CellRecords(settings.output), wanted)
    report(console, settings, cells, base)
