"""The words of `moe-bias eval` on a tiny model, and what it reads and writes."""

import json
from pathlib import Path

import torch

COMMON = ["eval", "--model", "model", "--device", "cpu", "--max-new-tokens", "6", "--batch-size", "6"]
SAMPLED = ["--samples", "2", "--temperature", "1"]


def write(path: Path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def words_to(output, *more, data="problems.jsonl"):
    return [*COMMON, "--data", data, "--output", str(output), *more]


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def generated(model, prompt, limit=6):
    """What `generate` answers greedily, without the end."""
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=limit, eos_token_id=2, pad_token_id=0)
    new = out[0, len(prompt) :].tolist()
    return new[: new.index(2)] if 2 in new else new
