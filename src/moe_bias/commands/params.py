"""`moe-bias params`: what an adapter would cost on a model, from the model's config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_bias.backbone import model_sizes
from moe_bias.config import LayerConfig, ModelSettings, ParamsSettings, UserError

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Trainable parameters of one choice of E experts and M support tokens."""

    num_experts: int
    support_size: int
    parameters: int


def run(settings: ParamsSettings) -> None:
    """Prints the table. Raises UserError on a support that is larger than the vocabulary."""
    model = ModelSettings(model=settings.model, trust_remote_code=settings.trust_remote_code)
    hidden_size, vocab_size, total = model_sizes(model)
    sizes = support_sizes(settings, vocab_size)
    console = Console()
    sizes_of_model = f"{total:,} parameters, hidden size {hidden_size:,}, vocabulary {vocab_size:,}"
    console.print(Text(f"{settings.model}: {sizes_of_model}"), soft_wrap=True)
    console.print(_table(costs(settings.experts, sizes, hidden_size, vocab_size), vocab_size, total))


def costs(experts: list[int], sizes: list[int], hidden_size: int, vocab_size: int) -> Iterator[Cost]:
    """The cost of each choice: E biases on M tokens, a router of E x D, and the gate's two scalars."""
    for num_experts in experts:
        for size in sizes:
            support = None if size == vocab_size else tuple(range(size))
            config = LayerConfig(num_experts=num_experts, top_k=1, support=support)
            yield Cost(num_experts, size, config.num_parameters(hidden_size, vocab_size))


def support_sizes(settings: ParamsSettings, vocab_size: int) -> list[int]:
    """The choices of M, ascending, the whole vocabulary last.

    A default that does not fit the vocabulary is left out; one that the user gave raises UserError.
    """
    too_large = [size for size in settings.supports if size > vocab_size]
    if too_large and "supports" in settings.model_fields_set:
        raise UserError(f"a support of {too_large[0]} tokens is larger than the vocabulary of {vocab_size}")
    return sorted({size for size in settings.supports if size < vocab_size} | {vocab_size})


def _table(rows: Iterator[Cost], vocab_size: int, total: int) -> Table:
    table = Table("experts E", "support M", "parameters", "share of the model", "float32", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    for cost in rows:
        whole = cost.support_size == vocab_size
        table.add_row(
            f"{cost.num_experts:,}",
            f"all {vocab_size:,}" if whole else f"{cost.support_size:,}",
            f"{cost.parameters:,}",
            f"{100 * cost.parameters / total:.4f}%",
            _size(cost.parameters * FLOAT32_BYTES),
            end_section=whole,
        )
    return table


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
