"""The files of a report, by their name in its folder, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moe_bias.report.content import Plot, Report
from moe_bias.report.figures import file_pdf, file_svg
from moe_bias.report.latex import latex
from moe_bias.report.markdown import markdown
from moe_bias.report.page import page
from moe_bias.report.table import Table


def report_files(report: Report) -> dict[str, Callable[[], bytes]]:
    """Page and Markdown, two files for each figure, one for each table."""
    files: dict[str, Callable[[], bytes]] = {}
    for part in (part for block in report.blocks for part in block.parts):
        if isinstance(part, Plot):
            files[f"figures/{part.name}.svg"] = partial(file_svg, part.figure, part.name, part.title)
            files[f"figures/{part.name}.pdf"] = partial(file_pdf, part.figure)
        elif isinstance(part, Table):
            files[f"tables/{part.name}.tex"] = partial(_encoded, latex, part)
    files["report.md"] = partial(_encoded, markdown, report)
    files["report.html"] = partial(_encoded, page, report)
    return files


def _encoded(write: Callable[[Any], str], what: Any) -> bytes:
    return write(what).encode()
