"""The words of `moe-bias eval` on a tiny model, and what it reads and writes."""

import json
from pathlib import Path

COMMON = ["eval", "--model", "model", "--device", "cpu", "--max-new-tokens", "6", "--batch-size", "6"]
SAMPLED = ["--samples", "2", "--temperature", "1"]


def write(path: Path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def words_to(output, *more, data="problems.jsonl"):
    return [*COMMON, "--data", data, "--output", str(output), *more]


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
