"""`moe-bias report`: a page, the same as Markdown, figures and tables, from the records of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_bias.commands.looking_settings import ReportSettings
from moe_bias.extras import need
from moe_bias.progress import meter, text_console
from moe_bias.records import write_whole

if TYPE_CHECKING:
    from moe_bias.report.record import Record

PAGE = "report.html"
_OF_WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What comes of a record whose values are not what its kind of run writes."""


def run(settings: ReportSettings) -> None:
    """Reads the records and writes the report's folder.

    Raises UserError where matplotlib is not installed, and on runs that no report can be made of.
    """
    need("matplotlib", "a report with figures")
    from moe_bias.report.record import read_records

    records = read_records(settings.runs)
    try:
        files = _made(records, settings.title)
    except _OF_WRONG_VALUES:
        _refuse_damaged(records)
        raise
    for name, content in files.items():
        write_whole(settings.output / name, content)
    page = settings.output / PAGE
    text_console().print(
        f"{page}, {page.stat().st_size / 2**20:.1f} MiB; the same as Markdown, figures and tables are beside it.",
        soft_wrap=True,
        highlight=False,
    )


def _made(records: Sequence[Record], title: str, visible: bool = True) -> dict[str, bytes]:
    """The files of a report of these records."""
    from moe_bias.report.build import build
    from moe_bias.report.files import report_files

    files = report_files(build(records, title))
    made = {}
    with meter("report", len(files), "files", visible) as bar:
        for name, content in files.items():
            made[name] = content()
            bar.advance(1)
    return made


def _refuse_damaged(records: Sequence[Record]) -> None:
    """Raises UserError on the first record of which alone no report can be made; without one the fault is ours."""
    from moe_bias.report.record import of_wrong_values

    for record in records:
        try:
            _made([record], "", visible=False)
        except _OF_WRONG_VALUES as error:
            raise of_wrong_values(record.path, record.kind, error) from error
