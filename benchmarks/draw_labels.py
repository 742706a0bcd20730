"""Draws docs/figures/labels-MODEL.svg: accuracy by the number of labelled texts, for each way and set, from records.

Lines are means over seeds, bars are 95% intervals over the texts; ways that learn nothing are level lines. The same
records give the same bytes.

    uv run python benchmarks/draw_labels.py [--png FOLDER]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from figure_text import FIGURES, LINE, write_figures

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "records" / "labels"
WAYS = {
    "zero-shot": ("zero-shot", "#8C8C8C", "-"),
    "contextual": ("contextual calibration", "#8C8C8C", "--"),
    "static": ("static bias", "#E69F00", "-"),
    "logistic": ("logistic regression", "#009E73", "-"),
    "probe": ("the same, as a layer", "#0072B2", "--"),
    "moe-bias": ("MoE-Bias, trained", "#0072B2", "-"),
    "lora": ("LoRA", "#D55E00", "-"),
}
"""Label, one of Okabe and Ito's colours, line."""
SETS = ("questions", "sms", "movies", "syllogism")
Record = dict[str, Any]


def figures() -> Iterator[tuple[Path, Figure]]:
    """The figures of all models that there are records of, by the path of each."""
    for model in models():
        yield FIGURES / f"labels-{model}.svg", drawn(found(model))


def models() -> list[str]:
    """The names of the models in the records' names."""
    return sorted({path.stem.rpartition("-")[0] for path in RECORDS.glob("*.json")})


def found(model: str) -> dict[str, Record]:
    """The records of a model, by set."""
    paths = {name: RECORDS / f"{model}-{name}.json" for name in SETS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def drawn(records: dict[str, Record]) -> Figure:
    """A panel for each set."""
    figure = Figure(figsize=(9.0, 3.6 if len(records) < 3 else 6.4), layout="constrained")
    panels = figure.subplots(1 if len(records) < 3 else 2, min(len(records), 2), squeeze=False).flatten()
    for axes, (name, record) in zip(panels, records.items(), strict=False):
        for way, (label, colour, style) in WAYS.items():
            _line(axes, [row for row in record["rows"] if row["way"] == way], label, colour, style)
        axes.set_title(f"{name}: {len(record['labels'])} labels", fontsize=10)
        axes.set_xscale("log", base=4)
        counts = record["settings"]["label_counts"]
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{count:,}" for count in counts])
        axes.set_xlabel("labelled texts")
        axes.grid(which="major", color=LINE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(records) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("texts right, %")
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _line(axes: Axes, rows: list[dict[str, Any]], label: str, colour: str, style: str) -> None:
    if not rows:
        return
    if rows[0]["count"] == 0:
        axes.axhline(100 * rows[0]["accuracy"]["value"], color=colour, linestyle=style, linewidth=1.2, label=label)
        return
    counts = [row["count"] for row in rows]
    value, low, high = ([100 * row["accuracy"][end] for row in rows] for end in ("value", "low", "high"))
    axes.plot(counts, value, style, color=colour, label=label, marker="o", markersize=3.5)
    axes.vlines(counts, low, high, color=colour, linewidth=1.2, alpha=0.6)


if __name__ == "__main__":
    write_figures(__doc__, figures())
