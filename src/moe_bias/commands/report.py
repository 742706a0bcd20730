"""`moe-bias report`: a page, the same as Markdown, figures and tables, from the records of finished runs."""

from __future__ import annotations

from importlib.util import find_spec

from moe_bias.config import ReportSettings, UserError
from moe_bias.progress import meter, text_console
from moe_bias.records import write_whole

PAGE = "report.html"


def run(settings: ReportSettings) -> None:
    """Reads the records and writes the report's folder.

    Raises UserError where matplotlib is not installed, and on runs that no report can be made of.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the report's figures are drawn by matplotlib, which is not installed: pip install matplotlib")
    from moe_bias.report.build import build
    from moe_bias.report.files import report_files
    from moe_bias.report.record import read_records

    files = report_files(build(read_records(settings.runs), settings.title))
    with meter("report", len(files), "files") as bar:
        for name, content in files.items():
            write_whole(settings.output / name, content())
            bar.advance(1)
    page = settings.output / PAGE
    text_console().print(
        f"{page}, {page.stat().st_size / 2**20:.1f} MiB; the same as Markdown, figures and tables are beside it.",
        soft_wrap=True,
        highlight=False,
    )
