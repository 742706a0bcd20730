"""Draws docs/figures/rl-or-sft.svg: accuracy by step on the trained rule and on a held-out one, from records.

Reinforcement learning and supervised learning go on from the same supervised phase, for MoE-Bias and
for LoRA. Lines are means over seeds, bands reach from the lowest seed to the highest. The same
records give the same bytes.

    uv run python benchmarks/draw_curves.py [--png PATH]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figure_text import svg_text

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "figures" / "rl-or-sft.svg"
RECORDS = ROOT / "records" / "compare" / "general-points" / "arms"
ARMS = {
    "moe-bias": ("MoE-Bias, RL", "#0072B2", "-"),
    "moe-bias-sft": ("MoE-Bias, supervised", "#0072B2", "--"),
    "lora": ("LoRA, RL", "#D55E00", "-"),
    "lora-sft": ("LoRA, supervised", "#D55E00", "--"),
}
"""Label, one of Okabe and Ito's colours, line."""
PANELS = {"held out": "rule and suits of training, new hands", "shifted": "held-out rule and suits"}
Curve = list[tuple[int, dict[str, float]]]


def main() -> None:
    """Writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, help="an image to look at, in place of the figure")
    options = parser.parse_args()
    if options.png:
        drawn(curves()).savefig(options.png, dpi=130)
    else:
        FIGURE.write_text(svg(), encoding="utf-8")


def svg() -> str:
    """The figure's text."""
    return svg_text(drawn(curves()))


def curves() -> dict[str, list[Curve]]:
    """By arm, the curve of each seed."""
    found: dict[str, list[Curve]] = {}
    for path in sorted(RECORDS.glob("*.json")):
        arm: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["arm"]
        if arm["name"] in ARMS:
            found.setdefault(arm["name"], []).append(arm["curve"])
    return found


def drawn(found: dict[str, list[Curve]]) -> Figure:
    """A panel for each set of problems, on one scale."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for arm, (label, colour, style) in ARMS.items():
            if arm in found:
                _line(axes, found[arm], name, label, colour, style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, None)
        axes.grid(which="major", color="#DDDDDD", linewidth=0.6)
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
    main()
