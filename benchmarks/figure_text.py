"""A figure as text that is the same each time: no date, no program's version, no random names, no trailing spaces."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure


def svg_text(figure: Figure) -> str:
    """The figure as SVG."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "moe-bias"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
