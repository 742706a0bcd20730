"""The figures' one style: labels beside what they name, units on the axes, intervals drawn, no frame, no ornament.

Colours are Okabe and Ito's, which the colour-blind tell apart; grey stands for the base model. A figure is
drawn once and written twice: for the page, where neutral colours follow the page's theme, and as a file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_bias.evaluation.statistics import Estimate

INK, MUTED, LINE = "#1d2125", "#5d6670", "#e3e3dd"
BASE, MAIN = "#8c8c8c", "#0072b2"
SERIES = (MAIN, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH = 5.0
"""Inches: at its own size on a desk, three quarters of it on a telephone, where its text can still be read."""
NUMBERED = 24
"""A heat map of up to so many columns has the number in each cell."""
_THEMED = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", MAIN: "var(--accent)"}
_STYLE: Any = {
    "font.size": 9,
    "text.parse_math": False,  # names hold dollar signs as they are
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Trade:
    """Accuracy at numbers of tokens, in order; `marked` points are drawn as such, with their intervals."""

    tokens: Sequence[float]
    accuracy: Sequence[Estimate]
    marked: bool = False


Row = tuple[str, Estimate]
Line = tuple[Sequence[float], Sequence[float]]


def intervals(
    rows: Sequence[Row], unit: str, form: str = "{:.3f}", *, scale: float = 1.0, zero: bool = False
) -> Figure:
    """A dot with its interval for each row, times `scale`, the value beside it; `zero` marks where nothing changes."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.75 + 0.3 * len(rows))
        for place, (label, estimate) in enumerate(reversed(rows)):
            colour = BASE if label.startswith("base") else MAIN
            ends = [scale * estimate.low, scale * estimate.high]
            axes.plot(ends, [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot(scale * estimate.value, place, "o", color=colour, markersize=6)
            axes.annotate(
                form.format(scale * estimate.value),
                (1.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
                color=INK,
            )
        if zero:
            axes.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x")
        axes.set_xlabel(unit)
        return _settled(figure)


def curves(lines: Mapping[str, Line], x_unit: str, unit: str, height: float = 2.6) -> Figure:
    """Lines over steps, each with its name at its end."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height)
        ends = []
        for number, (label, (x, y)) in enumerate(lines.items()):
            colour = BASE if label.startswith("base") else SERIES[number % len(SERIES)]
            numbers = np.asarray([x, y], dtype=np.float64)  # matplotlib would search texts for dates
            axes.plot(*numbers, color=colour, linewidth=1.6, marker="o" if len(x) < 25 else "", markersize=3.5)
            ends.append((y[-1], label, colour))
        _finish_curves(axes, x_unit, unit)
        _label_ends(axes, ends)
        return _settled(figure)


def trade_off(lines: Mapping[str, Trade], x_unit: str, unit: str) -> Figure:
    """Accuracy in percent over tokens: each line with its interval as a band, or as marked points that it joins."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.4)
        ends = []
        for number, (label, line) in enumerate(lines.items()):
            colour = BASE if label.startswith("base") else SERIES[number % len(SERIES)]
            x = np.asarray(line.tokens, dtype=np.float64)
            value, low, high = np.asarray([[e.value, e.low, e.high] for e in line.accuracy], dtype=np.float64).T * 100
            if line.marked:
                reach = np.maximum([value - low, high - value], 0)  # ends may be rounded past the value
                axes.errorbar(x, value, reach, color=colour, fmt="o-", markersize=5, linewidth=1.4)
            else:
                axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
                axes.plot(x, value, color=colour, linewidth=1.6)
            ends.append((float(value[-1]), label, colour))
        _finish_curves(axes, x_unit, unit)
        _label_ends(axes, ends)
        return _settled(figure)


def smoothed_curve(raw: Line, marked: Line | None, names: tuple[str, str], x_unit: str, unit: str) -> Figure:
    """A noisy line, faint, with its running mean over a fortieth of it, and measured points where there are any."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(2.6)
        x, y = np.asarray(raw[0]), np.asarray(raw[1], dtype=np.float64)
        axes.plot(x, y, color=BASE, linewidth=0.6, alpha=0.45)
        mean = running_mean(y, max(len(y) // 40, 1))
        axes.plot(x, mean, color=MUTED, linewidth=1.4)
        ends = [(float(mean[-1]), names[0], MUTED)]
        if marked is not None:
            axes.plot(*marked, color=MAIN, linewidth=1.6, marker="o", markersize=4)
            ends.append((marked[1][-1], names[1], MAIN))
        low, high = np.quantile(y, [0.002, 0.998])
        shown = [low, high, *(marked[1] if marked else [])]
        margin = 0.06 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        _finish_curves(axes, x_unit, unit)
        _label_ends(axes, ends)
        return _settled(figure)


def band(x: Sequence[float], estimates: Sequence[Estimate], unit: str, scale: float) -> Figure:
    """Estimates over steps, times `scale`, with their intervals."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(2.4)
        low, high = ([scale * end for end in ends] for ends in zip(*((e.low, e.high) for e in estimates), strict=True))
        axes.fill_between(x, low, high, color=MAIN, alpha=0.15, linewidth=0)
        values = [scale * estimate.value for estimate in estimates]
        axes.plot(x, values, color=MAIN, linewidth=1.6, marker="o", markersize=4)
        axes.annotate(f"{values[-1]:.3g}", (x[-1], values[-1]), xytext=(6, 0), textcoords="offset points", color=MAIN)
        _finish_curves(axes, "step", unit)
        return _settled(figure)


def running_mean(values: np.typing.NDArray[np.float64], width: int) -> np.typing.NDArray[np.float64]:
    """The mean over `width` values around each, over fewer at the ends."""
    window = np.ones(width)
    total: np.typing.NDArray[np.float64] = np.convolve(values, window, "same")
    return total / np.convolve(np.ones(len(values)), window, "same")


def histogram(edges: Sequence[float], counts: Mapping[str, Sequence[float]], threshold: float, unit: str) -> Figure:
    """Counts over bins of equal width on a logarithmic axis as outlines, with the threshold marked.

    The first bin, which reaches down to 0, is drawn as wide as the next; the last ones, where they are empty, not.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(2.9)
        bins = np.asarray(edges, dtype=np.float64)
        bins[0] = bins[1] ** 2 / bins[2]
        for number, (label, heights) in enumerate(counts.items()):
            colour = BASE if label.startswith("base") else SERIES[number % len(SERIES)]
            axes.stairs(heights, bins, color=colour, linewidth=1.6)
            axes.stairs(heights, bins, color=colour, fill=True, alpha=0.12)
            place = (0.02, 0.95 - 0.09 * number)
            axes.annotate(label, place, xycoords="axes fraction", color=colour, va="top")
        axes.set_xscale("log")
        axes.set_xlim(bins[0], bins[1 + max(int(np.flatnonzero(heights)[-1]) for heights in counts.values())])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axvline(threshold, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        place = (threshold, 1.01)
        axes.annotate(f"threshold {threshold:.2f}", place, xycoords=("data", "axes fraction"), color=INK, ha="center")
        axes.set_xlabel(unit)
        axes.set_ylabel("tokens in a bin")
        axes.grid(axis="y")
        return _settled(figure)


def heat_map(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], unit: str) -> Figure:
    """Shares as a table of coloured cells (cividis, which is read by lightness alone), in percent where they fit."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.6 + 0.26 * len(rows))
        table = np.asarray(values, dtype=np.float64)
        axes.pcolormesh(table, cmap="cividis", vmin=0, edgecolors="none")
        if len(columns) <= NUMBERED:
            _number_cells(axes, table)
        every = max(len(columns) // NUMBERED, 1)
        axes.set_xticks(np.arange(len(columns))[::every] + 0.5, columns[::every], color=INK)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, color=INK)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_xlabel(unit)
        return _settled(figure)


def _number_cells(axes: Axes, table: np.typing.NDArray[np.float64]) -> None:
    for (row, column), value in np.ndenumerate(table):
        colour = "#000000" if value > 0.6 * table.max() else "#ffffff"
        place = (column + 0.5, row + 0.5)
        axes.text(*place, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7.5)


def page_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of the page: with a title, ids that no other figure has, the page's colours and type."""
    text = _svg(figure, name, "none")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, themed in _THEMED.items():
        text = text.replace(colour, themed)
    return _titled(text, name, title)


def file_svg(figure: Figure, name: str, title: str) -> bytes:
    """The figure as a file of its own, on white."""
    text = _svg(figure, name, "white")
    start = text.index("<svg")
    return (text[:start] + _titled(text[start:], name, title)).encode()


def file_pdf(figure: Figure) -> bytes:
    """The figure for a paper."""
    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return content.getvalue()


def _svg(figure: Figure, name: str, background: str) -> str:
    """Text without a date or a program's version: the same figure gives the same bytes."""
    content = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(content, format="svg", facecolor=background, metadata={"Date": None, "Creator": None})
    return content.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")


def _titled(svg: str, name: str, title: str) -> str:
    opening, rest = svg.split(">", 1)
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    return f'{opening} role="img" aria-labelledby="{name}-title">\n<title id="{name}-title">{escaped}</title>{rest}'


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    return figure, axes


def _settled(figure: Figure) -> Figure:
    """With the layout made now, once for all files that the figure is written to."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _finish_curves(axes: Axes, x_unit: str, unit: str) -> None:
    axes.set_xlabel(x_unit)
    axes.set_ylabel(unit)
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the lines' right ends, pushed apart where lines end close together."""
    low, high = axes.get_ylim()
    gap = 0.085 * (high - low)
    place = -np.inf
    for value, label, colour in sorted(ends):
        place = max(value, place + gap)
        axes.annotate(label, (1.015, place), xycoords=("axes fraction", "data"), va="center", color=colour)
