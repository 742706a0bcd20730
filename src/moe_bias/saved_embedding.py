"""A model's output embedding alone, read from its files without the rest of its weights.

Shapes: D hidden size, V vocabulary, M tokens asked for.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from moe_bias.backbone import Head, OutputRows, find_head, measure_head_transform, output_embedding, unwrapped
from moe_bias.config import ModelConfig
from moe_bias.frozen import load_model, resolve_model
from moe_bias.layer import EmbeddingRows, at_least_float32


@dataclass(frozen=True)
class TensorRows:
    """An output embedding (V, D) of any floating type that stands alone: see `EmbeddingRows`."""

    weight_VD: Tensor

    def __call__(self, token_M: Tensor | None) -> Tensor:
        """The rows of some tokens (M, D), of all for None; in float32 or better."""
        return at_least_float32(self.weight_VD if token_M is None else self.weight_VD[token_M])

    def state(self) -> tuple[object, ...]:
        """The tensor is never written to."""
        return (self.weight_VD.data_ptr(),)


def embedding_rows(settings: ModelConfig) -> EmbeddingRows:
    """The rows of a model's output embedding: that one tensor of its files, or of the model where it is not found.

    Raises UserError where the model cannot be had.
    """
    found = stored_embedding(settings)
    if found is not None:
        return TensorRows(found)
    return OutputRows(unwrapped(output_embedding(load_model(settings)[0])))


def stored_embedding(settings: ModelConfig) -> Tensor | None:
    """The weight (V, D) as it stands in the model's safetensors files.

    None where they are not to be had, name their tensors otherwise than the model does, or hold it packed.
    """
    found = _without_weights(settings)
    return None if found is None else found[1]


def without_backbone(settings: ModelConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, Head]:
    """A model whose weights are on the meta device, and its head, which computes in `dtype` on the CPU.

    The whole model is loaded where its files do not tell the output embedding alone, or it has a bias of its own.
    Raises UserError where it cannot be had.
    """
    found = _without_weights(settings)
    if found is not None:
        model, weight_VD = found
        module = unwrapped(output_embedding(model))
        if getattr(module, "bias", None) is None:
            linear = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, dtype=dtype, device="meta")
            linear.load_state_dict({"weight": weight_VD.to(dtype)}, assign=True)
            return model, Head(linear.requires_grad_(False), measure_head_transform(model))
    type_name = str(dtype).removeprefix("torch.")
    model, _ = load_model(settings.model_copy(update={"dtype": type_name, "device": "cpu"}))
    return model, find_head(model)[1]


def _without_weights(settings: ModelConfig) -> tuple[PreTrainedModel, Tensor] | None:
    """The model on the meta device, and its output embedding's weight as `stored_embedding` has it."""
    path = resolve_model(settings.model)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
        with suppress(OSError):  # without such a file the config tells
            model.generation_config = GenerationConfig.from_pretrained(path)
        shape, names = _shape_and_names(model)
        weight_VD = _tensor_of_files(path, names, shape)
        return None if weight_VD is None else (model, weight_VD)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError):
        return None  # what is wrong is told when the model itself is loaded


def _shape_and_names(model: nn.Module) -> tuple[tuple[int, ...], set[str]]:
    """Shape of the output embedding's weight, and its names: tied to the input embedding it has two."""
    weight: Any = output_embedding(model).weight
    every = model.named_parameters(remove_duplicate=False)
    return tuple(weight.shape), {name for name, parameter in every if parameter is weight}


def _tensor_of_files(path: str, names: set[str], shape: tuple[int, ...]) -> Tensor | None:
    for name in sorted(names):
        file = _file_of(path, name)
        if file is None:
            continue
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensor: Tensor = tensors.get_tensor(name)
                whole = tuple(tensor.shape) == shape and tensor.dtype.itemsize > 1  # of 8 bits: scaled elsewhere
                return tensor if tensor.is_floating_point() and whole else None
    return None


def _file_of(path: str, name: str) -> Path | None:
    """The file that holds a tensor: the only one, or the one that the index names."""
    index = _cached(path, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return _cached(path, SAFE_WEIGHTS_NAME)
    file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
    return None if file is None else _cached(path, file)


def _cached(path: str, file: str) -> Path | None:
    found = cached_file(
        path,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
