"""The problems of an evaluation that the model solves sometimes: those that a step of rewards can learn from.

    uv run python runs/choose_problems.py SAMPLES PROBLEMS OUTPUT [--least 0.2] [--most 0.8]

SAMPLES is the output folder of `moe-bias eval`, PROBLEMS the JSON Lines file that it measured, with a column `id`.
OUTPUT has the rows of those whose share of right answers, of the model without an adapter, is within the bounds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from moe_bias.api.right_answers import BASE
from moe_bias.evaluation.samples import SampleFile
from moe_bias.records import write_whole


def main() -> None:
    """Chooses and writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("samples", type=Path)
    options.add_argument("problems", type=Path)
    options.add_argument("output", type=Path)
    options.add_argument("--least", type=float, default=0.2)
    options.add_argument("--most", type=float, default=0.8)
    chosen = options.parse_args()

    right: dict[str, list[bool]] = defaultdict(list)
    for sample in SampleFile(chosen.samples, 1).read():
        if sample.arm == BASE:
            right[sample.problem].append(sample.is_correct)
    within = {name for name, found in right.items() if chosen.least <= sum(found) / len(found) <= chosen.most}
    lines = chosen.problems.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if line and json.loads(line)["id"] in within]
    write_whole(chosen.output, "".join(line + "\n" for line in kept).encode())
    print(f"{len(kept):,} of {len(right):,} problems are solved {chosen.least:.0%} to {chosen.most:.0%} of the time")


if __name__ == "__main__":
    main()
