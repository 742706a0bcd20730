"""Finding and reading a saved adapter without its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe_bias.adapter import LAYERS
from moe_bias.config import LayerConfig, UserError, describe_error
from moe_bias.layer import check_layer_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LAYER_KEYS = frozenset(LayerConfig.model_fields)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's config file, the layer it describes, and its tensors by their name in the layer."""

    config: dict[str, Any]
    layer: LayerConfig
    tensors: dict[str, Tensor]


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, downloaded if it is on the Hub. Raises UserError where there is none."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(name)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{name!r} has no {file}: it is not a saved adapter")
    return folder


def read_adapter(name: str) -> SavedAdapter:
    """Raises UserError where the adapter is missing, of another method, or damaged."""
    folder = adapter_folder(name)
    config = read_config(folder)
    try:
        layer = LayerConfig(**{key: config[key] for key in _LAYER_KEYS if key in config})
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be used: {describe_error(error)}") from error
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    try:
        check_layer_tensors(tensors, _shapes(layer, tensors))
    except ValueError as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: {error}") from error
    return SavedAdapter(config, layer, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """The config file of a MoE-Bias adapter. Raises UserError on one of another method or no JSON."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    method = config.get("peft_type") if isinstance(config, dict) else None
    if method != "MOE_BIAS":
        raise UserError(f"{path} describes an adapter of type {method!r}, not of MOE_BIAS")
    assert isinstance(config, dict)
    return config


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{name!r} is neither a folder nor an adapter that the Hub delivered") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The layer's tensors; in the file their names begin with the path of the output embedding."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    mark = LAYERS + "."
    return {name.partition(mark)[2]: tensor for name, tensor in tensors.items() if mark in name}


def _shapes(layer: LayerConfig, tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that the config asks for; what only the model knows is taken from the file.

    Raises UserError where the file lacks a tensor of the layer or has one too many.
    """
    needed = {"experts", "router.weight", "hidden_mean", "hidden_scale"}
    needed |= {"entropy_gate.weight", "entropy_gate.bias"} if layer.entropy_gate else set()
    if needed != tensors.keys():
        raise UserError(f"it should hold the tensors {sorted(needed)}, and holds {sorted(tensors)}")
    hidden_size, columns = tensors["router.weight"].shape[-1], tensors["experts"].shape[-1]
    return {
        "experts": (layer.num_experts, layer.support_size(columns)),
        "router.weight": (layer.num_experts, hidden_size),
        "hidden_mean": (hidden_size,),
        "hidden_scale": (hidden_size,),
        "entropy_gate.weight": (1, 1),
        "entropy_gate.bias": (1,),
    }
