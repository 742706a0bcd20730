"""A figure as text that is the same each time: no date, no program's version, no random names, no trailing spaces.

It has no ground of its own, and what is neutral in it is light where the page that shows it is dark.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
INK, LINE = "#000000", "#dddddd"
"""What figures draw text and axes in, and grids."""
_THEME = """<style>
svg { --ink: #1c2024; --line: #dddddd; fill: var(--ink) }
@media (prefers-color-scheme: dark) { svg { --ink: #eceff3; --line: #3a424b } }
</style>
"""


def svg_text(figure: Figure) -> str:
    """The figure as SVG."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "moe-bias"}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue().replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    text = text.replace(" <metadata>", f"{_THEME} <metadata>", 1)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def write_figures(description: str | None, figures: Iterable[tuple[Path, Figure]]) -> None:
    """The whole of a script: writes the figures, or with --png images of them to look at."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, help="folder for images to look at, in place of the figures")
    options = parser.parse_args()
    for path, figure in figures:
        if options.png:
            options.png.mkdir(parents=True, exist_ok=True)
            figure.savefig(options.png / f"{path.stem}.png", dpi=130)
        else:
            path.write_text(svg_text(figure), encoding="utf-8")
