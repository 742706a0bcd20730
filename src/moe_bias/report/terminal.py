"""Tables as a terminal shows them."""

from __future__ import annotations

from typing import Any

from rich.table import Table as TerminalTable

from moe_bias.report.table import Column, Row, Table


def terminal_table(table: Table, stacked: bool = False, **options: Any) -> TerminalTable:
    """The table, its caption above it; `stacked` puts intervals below their values, which takes less width."""
    firsts = [column for column in table.columns if not column.below]
    below = {column.below: column for column in table.without_empty_columns().columns if column.below}
    title = f"{table.caption} (second lines)" if below else table.caption
    shown = TerminalTable(title=title or None, title_justify="left", **options)
    for column in firsts:
        whole = column.heading in below
        shown.add_column(column.heading, justify="left" if column.words else "right", overflow="fold", no_wrap=whole)
    for row in table.rows:
        shown_below = below if any(column.cell(row) for column in below.values()) else {}
        shown.add_row(*(_cell(column, row, shown_below, stacked) for column in firsts))
    return shown


def _cell(column: Column, row: Row, below: dict[str, Column], stacked: bool) -> str:
    lines = [column.cell(row)]
    if column.heading in below:
        lines.append(below[column.heading].cell(row))
    lines = [line or ("" if column.words else "-") for line in lines]
    return "\n".join(line.replace(" [", "\n[") if stacked and not column.words else line for line in lines)
