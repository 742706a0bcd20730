"""Worked solutions of grade-school problems as rows to train on, under the very prompt that `moe-bias eval` asks with.

    uv run python runs/worked_answers.py PROBLEMS OUTPUT [--limit N] [--seed S]

PROBLEMS is a JSON Lines file with the columns problem, answer and solution, as GSM8K is kept: marks of the calculator
(<<...>>) are left out, and the last line, "#### 72", becomes a sentence with the answer in a box.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from moe_bias.records import write_whole
from moe_bias.tasks.mathematics import INSTRUCTION


def main() -> None:
    """Writes the rows."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("problems", type=Path)
    options.add_argument("output", type=Path)
    options.add_argument("--limit", type=int)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()

    problems = [json.loads(line) for line in chosen.problems.read_text(encoding="utf-8").split("\n") if line]
    if chosen.limit is not None:
        problems = random.Random(chosen.seed).sample(problems, min(chosen.limit, len(problems)))
    rows = [_row(one) for one in problems]
    write_whole(chosen.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    print(f"{len(rows):,} worked answers in {chosen.output}")


def _worked(solution: str, answer: str) -> str:
    steps = re.sub(r"<<[^>]*>>", "", solution).split("\n####")[0].rstrip()
    return f"{steps}\nThe answer is \\boxed{{{answer}}}."


def _row(problem: dict[str, str]) -> dict[str, str]:
    return {
        "question": f"{problem['problem']}\n\n{INSTRUCTION}",
        "answer": _worked(problem["solution"], problem["answer"]),
    }


if __name__ == "__main__":
    main()
