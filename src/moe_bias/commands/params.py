"""`moe-bias params`: what an adapter would cost on a model, from the model's config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from moe_bias.commands.looking_settings import ParamsSettings
from moe_bias.config import LayerConfig, ModelConfig
from moe_bias.frozen import model_sizes
from moe_bias.mistakes import UserError
from moe_bias.progress import text_console

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Trainable parameters of one kind of experts, of E of them, and with free entries of M support tokens."""

    kind: str
    num_experts: int
    support_size: int | None
    parameters: int


def run(settings: ParamsSettings) -> None:
    """Prints the table. Raises UserError on a support that is larger than the vocabulary."""
    model = ModelConfig(model=settings.model, trust_remote_code=settings.trust_remote_code)
    hidden_size, vocab_size, total = model_sizes(model)
    console = text_console()
    sizes_of_model = f"{total:,} parameters, hidden size {hidden_size:,}, vocabulary {vocab_size:,}"
    console.print(Text(f"{settings.model}: {sizes_of_model}"), soft_wrap=True)
    console.print(_table(costs(settings, hidden_size, vocab_size), vocab_size, total))


def costs(settings: ParamsSettings, hidden_size: int, vocab_size: int) -> Iterator[Cost]:
    """The cost of each choice; of a kind without free entries the support does not matter.

    Raises UserError on a support that is larger than the vocabulary.
    """
    sizes = support_sizes(settings, vocab_size)
    for experts in dict.fromkeys(settings.experts):
        for num_experts in settings.num_experts:
            base = LayerConfig(
                num_experts=num_experts,
                top_k=1,
                experts=experts,
                expert_rank=settings.expert_rank,
                free_entries=settings.free_entries,
            )
            for size in sizes if base.has_entries else [None]:
                support = None if size in (None, vocab_size) else tuple(range(size))
                config = base.model_copy(update={"support": support})
                yield Cost(_kind(config), num_experts, size, config.num_parameters(hidden_size, vocab_size))


def _kind(config: LayerConfig) -> str:
    rank = f", rank {config.rank}" if config.rank else ""
    return f"{config.experts}{rank}{' + free' if config.through_embedding and config.free_entries else ''}"


def support_sizes(settings: ParamsSettings, vocab_size: int) -> list[int]:
    """The choices of M, ascending, the whole vocabulary last.

    A default that does not fit the vocabulary is left out; one that the user gave raises UserError.
    """
    too_large = [size for size in settings.supports if size > vocab_size]
    if too_large and "supports" in settings.model_fields_set:
        raise UserError(f"a support of {too_large[0]} tokens is larger than the vocabulary of {vocab_size}")
    return sorted({size for size in settings.supports if size < vocab_size} | {vocab_size})


def _table(rows: Iterator[Cost], vocab_size: int, total: int) -> Table:
    headings = ("experts", "E", "support M", "parameters", "of the model", "float32")
    table = Table(*headings, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    group = None
    for cost in rows:
        if group not in (None, _group(cost)):
            table.add_section()
        group = _group(cost)
        table.add_row(
            cost.kind,
            f"{cost.num_experts:,}",
            _support(cost.support_size, vocab_size),
            f"{cost.parameters:,}",
            f"{100 * cost.parameters / total:.4f}%",
            _size(cost.parameters * FLOAT32_BYTES),
        )
    return table


def _group(cost: Cost) -> tuple[object, ...]:
    """Rows that stand together: those of a kind, and with free entries of a number of experts."""
    return (cost.kind,) if cost.support_size is None else (cost.kind, cost.num_experts)


def _support(size: int | None, vocab_size: int) -> str:
    if size is None:
        return "any"
    return f"all {size:,}" if size == vocab_size else f"{size:,}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
