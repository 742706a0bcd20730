"""`moe-bias inspect`: a saved adapter's config, its norms, what its experts raise and lower, and what they read."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoTokenizer

from moe_bias.adapter import MoEBiasConfig
from moe_bias.adapter.saved import read_saved
from moe_bias.analysis import Decode, ExpertView, any_off_support, expert_views
from moe_bias.commands.expert_table import OFF_SUPPORT, moved, readings_table
from moe_bias.commands.looking_settings import InspectSettings
from moe_bias.config import ModelConfig
from moe_bias.frozen import resolve_model
from moe_bias.layer import EmbeddingRows, MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.progress import text_console
from moe_bias.saved_embedding import embedding_rows

WIDTH_OF_A_FILE = 100
"""Columns where standard output is no terminal, which would give 80."""


def run(settings: InspectSettings) -> None:
    """Prints the tables. Raises UserError where the adapter is missing, foreign or damaged.

    Experts that are made through the output embedding are shown where the model's can be had; where not, a sentence
    says why.
    """
    config, tensors = read_saved(settings.adapter)
    console = text_console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    console.print(_config_table(config))
    console.print(_tensor_table(tensors))
    try:
        layer = _layer(config, tensors, settings)
    except UserError as error:
        console.print(Text(f"The experts' tokens are not shown: {error}."), soft_wrap=True)
        return
    decode, remark = _decoder(settings.model or config.base_model_name_or_path)
    _print_experts(console, expert_views(layer, settings.top, decode, settings.readings), settings.top)
    if remark:
        console.print(Text(remark), soft_wrap=True)


def _layer(config: MoEBiasConfig, tensors: dict[str, Tensor], settings: InspectSettings) -> MoEBiasLayer:
    """The adapter's layer. Raises UserError where its experts need an output embedding that cannot be had."""
    assert config.hidden_size is not None
    assert config.vocab_size is not None
    choices = config.layer_config()
    rows = _rows(config, settings) if choices.through_embedding else None
    layer = MoEBiasLayer(choices, config.hidden_size, config.vocab_size, rows)
    layer.load_state_dict(tensors)
    return layer


def _rows(config: MoEBiasConfig, settings: InspectSettings) -> EmbeddingRows:
    """The output embedding that the adapter was made on, of which it has kept a sample."""
    name = settings.model or config.base_model_name_or_path
    if not name:
        raise UserError("the adapter does not name its base model; name it with --model")
    rows = embedding_rows(
        ModelConfig(model=name, device="cpu", dtype="auto", trust_remote_code=settings.trust_remote_code)
    )
    vocab_size, hidden_size = rows(None).shape
    config.for_model(hidden_size, vocab_size, rows)
    return rows


def _config_table(config: MoEBiasConfig) -> Table:
    table = Table("config", "", box=box.SIMPLE_HEAD)
    for key, value in sorted(config.to_dict().items()):
        if value not in (None, {}, []):
            table.add_row(Text(key), Text(_short(key, value)))
    return table


def _short(key: str, value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} {'token ids' if key == 'support' else 'numbers'}"
    return str(value)


def _tensor_table(tensors: dict[str, Tensor]) -> Table:
    table = Table("tensor", "shape", "norm", "largest", box=box.SIMPLE_HEAD)
    for name, tensor in sorted(tensors.items()):
        values = tensor.double()
        shape = " x ".join(str(size) for size in tensor.shape)
        table.add_row(name, shape, f"{float(values.norm()):.4g}", f"{float(values.abs().max()):.4g}")
    return table


def _print_experts(console: Console, views: Sequence[ExpertView], top: int) -> None:
    table = Table("expert", "norm", "raises", "lowers", box=box.SIMPLE_HEAD)
    for number, view in enumerate(views):
        table.add_row(str(number), f"{view.norm:.4g}", moved(view.raised), moved(view.lowered))
    console.print(table)
    readings = readings_table(list(enumerate(views)), max(top // 2, 1))
    if readings is not None:
        console.print(readings)
    if any_off_support(views):
        console.print(Text(f"Tokens {OFF_SUPPORT}."), soft_wrap=True)


def _decoder(base_model: str | None) -> tuple[Decode, str]:
    """From token ids to text, none where it cannot be had; a remark then says so."""
    if not base_model:
        return _no_text, "Tokens are shown as ids: the adapter does not name its base model."
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(base_model))
    except Exception:  # the loaders of tokenizers raise anything
        return _no_text, f"Tokens are shown as ids: the tokenizer of {base_model!r} could not be had."
    return tokenizer.decode, ""


def _no_text(token_ids: Sequence[int]) -> str:
    return ""
