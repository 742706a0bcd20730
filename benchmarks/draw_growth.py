"""Draws docs/figures/update-growth.svg from the newest growth record: seconds per epoch over tokens, both logarithmic.

One line for each support and arm, its slope fitted: 1 means that twice the tokens take twice as long.
The same record gives the same bytes.

    uv run python benchmarks/draw_growth.py [--png PATH]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from figure_text import INK, LINE, svg_text
from moe_bias.records import write_whole

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "figures" / "update-growth.svg"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", INK)
"""Okabe and Ito's, which the colour-blind tell apart; one for each size of support, ascending."""
STYLES = {"support": ("-", "o"), "full": ("-", "o"), "kept": ("--", "s")}
Line = tuple[list[int], list[float]]


def main() -> None:
    """Writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, help="also as an image to look at")
    options = parser.parse_args()
    record = newest()
    write_whole(FIGURE, svg(record).encode())
    if options.png:
        drawn(record).savefig(options.png, dpi=130)


def newest() -> dict[str, Any]:
    """The growth record to draw."""
    path = max((ROOT / "records" / "benchmarks").glob("growth-*.json"))
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def svg(record: dict[str, Any]) -> str:
    """The figure's text."""
    return svg_text(drawn(record))


def drawn(record: dict[str, Any]) -> Figure:
    """The figure, its legend beside the axes in the order of the lines."""
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    lines = lines_of(record["cells"])
    supports = sorted({support for _, support in lines})
    for (arm, support), (tokens, seconds) in sorted(lines.items(), key=lambda item: -item[1][1][0]):
        style, marker = STYLES[arm]
        colour = COLOURS[supports.index(support) % len(COLOURS)]
        label = f"{name_of(arm, support)}, slope {slope(tokens, seconds)}"
        axes.loglog(tokens, seconds, linestyle=style, marker=marker, markersize=5, color=colour, label=label)
    _finish(axes, sorted({cell["tokens"] for cell in record["cells"]}))
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def lines_of(cells: list[dict[str, Any]]) -> dict[tuple[str, int], Line]:
    """Tokens and seconds of each arm and support, without the cells that were not kept."""
    lines: dict[tuple[str, int], Line] = defaultdict(lambda: ([], []))
    for cell in sorted(cells, key=lambda cell: cell["tokens"]):
        if cell["seconds"] is not None:
            tokens, seconds = lines[cell["arm"], cell["support"]]
            tokens.append(cell["tokens"])
            seconds.append(cell["seconds"])
    return dict(lines)


def slope(tokens: list[int], seconds: list[float]) -> str:
    """The least-squares slope of log seconds over log tokens; of one point there is none."""
    return f"{np.polyfit(np.log(tokens), np.log(seconds), 1)[0]:.2f}" if len(tokens) > 1 else "–"


def name_of(arm: str, support: int) -> str:
    """How the legend calls a line."""
    whole = {"full": "M = V", "support": "M", "kept": "M"}[arm]
    size = f"{whole} = {support:,}"
    return f"{size}, logits kept" if arm == "kept" else size


def _finish(axes: Axes, tokens: list[int]) -> None:
    axes.set_xlabel("tokens of the corpus")
    axes.set_ylabel("seconds per epoch")
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="major", color=LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
