"""What each arm cost: parameters, bytes, tokens, seconds, memory, and what part of LoRA's that is where it was run.

A record says what it says: an empty cell was not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_bias.config import LayerConfig
from moe_bias.records import RecordKind
from moe_bias.report.content import Block, Topic
from moe_bias.report.record import Record
from moe_bias.report.table import Column, Table
from moe_bias.report.tables import PARAMETERS

_WEIGHTS = "adapter_model.safetensors"
_ROWS = {RecordKind.CELLS: "rows", RecordKind.ARMS: "rows", RecordKind.EVALUATION: "arms", RecordKind.DEMO: "arms"}
"""Where a record of many arms has them. What a kind does not measure of an arm is not in its rows."""


_COLUMNS = [
    Column("run", ("run",), words=True),
    Column("arm", ("arm",), words=True),
    PARAMETERS,
    Column("adapter, KiB", ("file_bytes",), "{:,.0f}", 1 / 1024),
    Column("tokens", ("tokens",), "{:,.0f}"),
    Column("seconds", ("seconds",), "{:,.1f}"),
    Column("peak, MiB", ("peak_bytes",), "{:,.0f}", 1 / 2**20),
    Column("of LoRA's parameters", ("of_parameters",), "{:.1%}"),
    Column("of LoRA's seconds", ("of_seconds",), "{:.1%}"),
]


@dataclass(frozen=True)
class Cost:
    """One arm. `tokens` were trained on or sampled; `peak_bytes` include the frozen model."""

    run: str
    arm: str
    parameters: int | None = None
    file_bytes: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


def cost_block(records: Sequence[Record]) -> Block | None:
    """The table of all arms of all runs, or None where no record has any."""
    groups = [costs for record in records if (costs := list(_costs(record)))]
    if not groups:
        return None
    caption = "Tokens trained on or sampled, seconds of training, memory with the frozen model; empty: not recorded"
    rows = [row for group in groups for row in _beside_lora(group)]
    return Block(Topic.COST, "", [Table("cost", caption, _COLUMNS, rows).without_empty_columns()])


def _costs(record: Record) -> Iterator[Cost]:
    name, content = record.name, record.content
    if record.kind is RecordKind.SUPERVISED:
        yield Cost(name, "adapter", _parameters(record), _size(record), *_trained(record))
    elif record.kind is RecordKind.POLICY:
        spent = content["position"]
        yield Cost(name, "adapter", _parameters(record), _size(record), spent["sampled_tokens"], spent["seconds"])
    for row in content.get(_ROWS.get(record.kind, ""), ()):
        tokens = row.get("train_tokens", row.get("sampled_tokens"))
        yield Cost(name, row["name"], row["parameters"], None, tokens, row.get("seconds"), row.get("peak_bytes"))


def _parameters(record: Record) -> int | None:
    """By the adapter's config beside the record."""
    path = record.path.parent / "adapter_config.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    config = LayerConfig(**{name: found[name] for name in ("num_experts", "top_k", "support", "entropy_gate")})
    return config.num_parameters(found["hidden_size"], found["vocab_size"])


def _trained(record: Record) -> tuple[int, float] | tuple[None, None]:
    """Tokens trained on and the seconds that took, step by step, however often the run was stopped between."""
    steps = [line for line in record.metrics if "tokens" in line]
    if not steps:
        return None, None
    return sum(line["tokens"] for line in steps), sum(line["tokens"] / line["tokens_per_second"] for line in steps)


def _size(record: Record) -> int | None:
    path = record.path.parent / _WEIGHTS
    return path.stat().st_size if path.is_file() else None


def _beside_lora(group: Sequence[Cost]) -> Iterator[dict[str, Any]]:
    """The arms of a run, with their shares of what LoRA took where it was run."""
    lora = next((cost for cost in group if cost.arm.startswith("lora")), Cost("", ""))
    for cost in group:
        shares = {"of_parameters": (cost.parameters, lora.parameters), "of_seconds": (cost.seconds, lora.seconds)}
        yield asdict(cost) | {name: a / b if a is not None and b else None for name, (a, b) in shares.items()}
