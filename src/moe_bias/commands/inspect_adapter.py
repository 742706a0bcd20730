"""`moe-bias inspect`: a saved adapter's config, its norms, and the tokens that each expert moves most."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoTokenizer

from moe_bias.adapter import MoEBiasConfig
from moe_bias.analysis import TokenBias, strongest_tokens
from moe_bias.backbone import resolve_model
from moe_bias.commands.saved import read_saved
from moe_bias.config import InspectSettings

Spelling = Callable[[int], str]


def run(settings: InspectSettings) -> None:
    """Prints three tables. Raises UserError where the adapter is missing, foreign or damaged."""
    config, tensors = read_saved(settings.adapter)
    spelling, remark = _spelling(config.base_model_name_or_path)
    console = Console()
    console.print(_config_table(config))
    console.print(_tensor_table(tensors))
    console.print(_expert_table(tensors["experts"].double(), config.support, spelling, settings.top))
    if remark:
        console.print(Text(remark), soft_wrap=True)


def _config_table(config: MoEBiasConfig) -> Table:
    table = Table("config", "", box=box.SIMPLE_HEAD)
    for key, value in sorted(config.to_dict().items()):
        if value not in (None, {}, []):
            table.add_row(Text(key), Text(_short(key, value)))
    return table


def _short(key: str, value: object) -> str:
    return f"{len(value)} token ids" if key == "support" and isinstance(value, list) else str(value)


def _tensor_table(tensors: dict[str, Tensor]) -> Table:
    table = Table("tensor", "shape", "norm", "largest", box=box.SIMPLE_HEAD)
    for name, tensor in sorted(tensors.items()):
        values = tensor.double()
        shape = " x ".join(str(size) for size in tensor.shape)
        table.add_row(name, shape, f"{float(values.norm()):.4g}", f"{float(values.abs().max()):.4g}")
    return table


def _expert_table(experts_EM: Tensor, support: list[int] | None, spelling: Spelling, top: int) -> Table:
    table = Table("expert", "norm", "raises", "lowers", box=box.SIMPLE_HEAD)
    for number, tokens in enumerate(strongest_tokens(experts_EM, support, top)):
        raised, lowered = (_listed(side, spelling) for side in (tokens.raised, tokens.lowered))
        table.add_row(str(number), f"{float(experts_EM[number].norm()):.4g}", raised, lowered)
    return table


def _listed(tokens: list[TokenBias], spelling: Spelling) -> Text:
    return Text(", ".join(f"{spelling(entry.token)} {entry.bias:+.2f}" for entry in tokens))


def _spelling(base_model: str | None) -> tuple[Spelling, str]:
    """How a token id is shown, and a remark where its text cannot be had."""
    if not base_model:
        return str, "Tokens are shown as ids: the adapter does not name its base model."
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(base_model))
    except (OSError, ValueError):
        return str, f"Tokens are shown as ids: the tokenizer of {base_model!r} could not be had."
    return lambda token: repr(tokenizer.decode([token])), ""
