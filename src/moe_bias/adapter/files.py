"""Adapter folders: what they hold, checking it, writing and reading it. Safetensors and JSON only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_bias.adapter.card import CARD, has_other_card
from moe_bias.adapter.config import MoEBiasConfig
from moe_bias.backbone import OutputRows, output_embedding, unwrapped
from moe_bias.config import LayerConfig
from moe_bias.layer import ROUTER, MoEBiasLayer, at_least_float32, check_layer_tensors, check_layer_values
from moe_bias.mistakes import UserError, reading
from moe_bias.records import unfinished

LAYERS = "moe_bias_layers"
"""The head's container of layers. Its name is part of every key in an adapter file."""


def layer_shapes(config: LayerConfig, hidden_size: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter file holds."""
    with torch.device("meta"):
        layer = MoEBiasLayer(config, hidden_size, vocab_size)
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def layer_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter file by their name in the layer; other tensors are left out."""
    mark = f"{LAYERS}."
    return {key.rpartition(mark)[2]: value for key, value in state_dict.items() if mark in key}


def check_adapter_file(state_dict: Mapping[str, Tensor], config: MoEBiasConfig) -> None:
    """Raises ValueError, in one sentence, on an adapter file with a missing, misshapen or damaged tensor."""
    assert config.hidden_size is not None
    assert config.vocab_size is not None
    shapes = layer_shapes(config.layer_config(), config.hidden_size, config.vocab_size)
    tensors = layer_tensors(state_dict)
    if not config.layer_config().has_router:
        tensors.pop(ROUTER, None)
    for what, names in (("lacks", set(shapes) - set(tensors)), ("has an unknown", set(tensors) - set(shapes))):
        if names:
            raise UserError(f"the adapter file {what} tensor {min(names)!r}")
    check_layer_tensors(tensors, shapes)
    check_layer_values(tensors, config.strength)


def save_layer(
    layer: MoEBiasLayer, folder: str | Path, model: nn.Module, fork_coverage: float | None = None
) -> MoEBiasConfig:
    """Writes a layer that stands alone as an adapter folder that PEFT loads; returns its config.

    The files are written in a folder of their own and moved out of it, the config last: until it is there,
    there is no adapter to be found. A README.md that someone wrote there stays.
    """
    head = output_embedding(model)
    name = next(name for name, module in model.named_modules() if module is head)
    config = MoEBiasConfig(
        **layer.config.model_dump(), fork_coverage=fork_coverage, base_model_name_or_path=_name_of(model)
    ).for_model(layer.hidden_size, layer.vocab_size, OutputRows(unwrapped(head)))
    config.inference_mode = True
    config.strength = layer.strength
    tensors = {
        f"base_model.model.{name}.{LAYERS}.{key}": at_least_float32(value).contiguous()
        for key, value in layer.state_dict().items()
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with unfinished(target / "adapter") as scratch:
        beside = scratch / target.name
        config.save_pretrained(str(beside))
        save_file(tensors, beside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if has_other_card(target):
            (beside / CARD).unlink()
        for file in sorted(beside.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(target / file.name)
    return config


def read_adapter(folder: str | Path) -> tuple[MoEBiasConfig, dict[str, Tensor]]:
    """Config and tensors of an adapter folder, the tensors named as in its file.

    Raises ValueError where there is no MoE-Bias adapter, or a file that cannot be read.
    """
    config = MoEBiasConfig.from_pretrained(str(folder))
    if not isinstance(config, MoEBiasConfig):
        raise UserError(f"{str(folder)!r} holds an adapter of {type(config).__name__}, not a MoE-Bias one")
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{str(folder)!r} holds no {SAFETENSORS_WEIGHTS_NAME}")
    with reading(f"adapter file {str(path)!r}"):
        return config, load_file(path)


def _name_of(model: nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None
