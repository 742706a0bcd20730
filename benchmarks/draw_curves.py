"""Draws docs/figures/rl-or-sft-TASK.svg: accuracy by step as trained and on what was never trained on, from records.

Reinforcement learning and supervised learning go on from the same supervised phase, for MoE-Bias and
for LoRA. Lines are means over seeds, bands reach from the lowest seed to the highest. The same
records give the same bytes.

    uv run python benchmarks/draw_curves.py [--png PATH]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figure_text import FIGURES, LINE, write_figures

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "records" / "compare"
ARMS = {
    "moe-bias": ("MoE-Bias, RL", "#0072B2", "-"),
    "moe-bias-sft": ("MoE-Bias, supervised", "#0072B2", "--"),
    "lora": ("LoRA, RL", "#D55E00", "-"),
    "lora-sft": ("LoRA, supervised", "#D55E00", "--"),
}
"""Label, one of Okabe and Ito's colours, line."""
PANELS = {
    "products": {"held out": "two or three factors, as trained", "shifted": "four factors, never trained on"},
    "gcd": {"held out": "numbers up to 50, as trained", "shifted": "numbers from 51, never trained on"},
    "general-points": {"held out": "rule and suits as trained", "shifted": "rule and suits never trained on"},
}
"""By task and set of problems, the title of a panel."""
Curve = list[tuple[int, dict[str, float]]]


def figures() -> Iterator[tuple[Path, Figure]]:
    """The figures of all tasks that there are records of, by the path of each."""
    for task in PANELS:
        found = curves(task)
        if found:
            yield FIGURES / f"rl-or-sft-{task}.svg", drawn(task, found)


def curves(task: str) -> dict[str, list[Curve]]:
    """By arm, the curve of each seed."""
    found: dict[str, list[Curve]] = {}
    for path in sorted(RECORDS.glob(f"{task}/arms/*.json")):
        arm: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["arm"]
        if arm["name"] in ARMS:
            found.setdefault(arm["name"], []).append(arm["curve"])
    return found


def drawn(task: str, found: dict[str, list[Curve]]) -> Figure:
    """A panel for each set of problems, on one scale."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = figure.subplots(1, len(PANELS[task]), sharey=True)
    for axes, (name, title) in zip(panels, PANELS[task].items(), strict=True):
        for arm, (label, colour, style) in ARMS.items():
            if arm in found:
                _line(axes, found[arm], name, label, colour, style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, None)
        axes.grid(which="major", color=LINE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("problems solved, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), frameon=False, fontsize=9)
    return figure


def _line(axes: Axes, seeds: list[Curve], name: str, label: str, colour: str, style: str) -> None:
    steps = [step for step, _ in seeds[0]]
    percent = 100 * np.array([[accuracy[name] for _, accuracy in curve] for curve in seeds])
    axes.plot(steps, percent.mean(0), style, color=colour, label=label, marker="o", markersize=3.5)
    axes.fill_between(steps, percent.min(0), percent.max(0), color=colour, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    write_figures(__doc__, figures())
