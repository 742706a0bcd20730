"""Writes a text of many kinds, as an adapter meets it that serves several tasks: rows of files, tasks' worked answers.

From each file come its first rows, from each task as many worked answers, all in a random order drawn with a fixed
seed.

    uv run python runs/mixed_texts.py FILE TEXT.jsonl [TEXT.jsonl ...] [--rows 150]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from moe_bias.tasks.catalogue import make_task

TASKS = (
    "products",
    "gcd",
    "chain_sum",
    "leg_counting",
    "letter_counting",
    "spell_backward",
    "gsm_symbolic",
    "general_points",
)
"""Of which worked answers show their steps."""
COLUMNS = (("question", "answer"), ("problem", "solution"))


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=150, help="of each file, and of each task")
    options = parser.parse_args()
    rows = [row for text in options.texts for row in itertools.islice(rows_of(text), options.rows)]
    for name in TASKS:
        problems = make_task(name, {}, small=True).problems(options.rows, seed=0)
        rows += [(problem.question, problem.worked) for problem in problems]
    random.Random(0).shuffle(rows)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with options.file.open("w", encoding="utf-8") as file:
        for question, answer in rows:
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


def rows_of(text: Path) -> Iterator[tuple[str, str]]:
    """Question and answer of each row, in whichever of the columns the file has them."""
    with text.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            question, answer = next(names for names in COLUMNS if all(name in row for name in names))
            yield row[question], row[answer]


if __name__ == "__main__":
    main()
