"""The point in vLLM where a model's hidden states become logits.

Every model of vLLM makes its logits by one layer, `LogitsProcessor`, called with the output embedding
and exactly the hidden states that it reads; soft-cap and scale are part of that layer. A hook on it
therefore sees hidden states and final logits of all rows of a step, before any grammar masks them. A
model that changes the logits once more after that layer is refused when it has been loaded.

Shapes: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from moe_bias.backbone import HeadTransform
from moe_bias.mistakes import UserError
from moe_bias.serving.embedding import ServedEmbedding, read_embedding


class HeadReader(Protocol):
    """What follows a model's head."""

    def on_head(self, hidden_BD: Tensor, logits_BV: Tensor, transform: HeadTransform) -> None:
        """Sees each call of the head, and may overwrite the final logits; `transform` has their soft-cap."""
        ...


@dataclass(frozen=True)
class ServedHead:
    """The layer that makes a model's logits, and the output embedding that it is called with."""

    layer: LogitsProcessor
    embedding: ServedEmbedding


def find_served_head(model: Any, model_config: ModelConfig) -> ServedHead:
    """Where the model makes its logits. All ranks call this together.

    Raises UserError where the model's logits are not that layer's output as it is.
    """
    name = type(model).__name__
    layers = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    made: list[tuple[LogitsProcessor, Any, Any]] = []

    def hook(layer: LogitsProcessor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made.append((layer, kwargs["lm_head"] if "lm_head" in kwargs else args[0], output))

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        hidden = torch.zeros(
            1, model_config.get_hidden_size(), dtype=model_config.dtype, device=next(model.parameters()).device
        )
        with torch.inference_mode():
            logits = model.compute_logits(hidden)
    finally:
        for placed in hooks:
            placed.remove()
    if len(made) != 1 or made[0][2] is not logits:
        raise UserError(
            f"{name} changes its logits in a way of its own after the output embedding, which MoE-Bias does not know; "
            "serve it without MOE_BIAS_ADAPTERS"
        )
    layer, lm_head, _ = made[0]
    return ServedHead(layer, read_embedding(lm_head, model_config))


def follow(layer: LogitsProcessor, reader: HeadReader) -> None:
    """From here on `reader` sees every call of the layer. On ranks that get no logits it sees none."""
    # vLLM caps before it scales.
    transform = HeadTransform(cap=None if layer.soft_cap is None else layer.soft_cap * layer.scale)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor | None) -> None:
        if logits is not None:
            reader.on_head(kwargs["hidden_states"] if "hidden_states" in kwargs else args[1], logits, transform)

    layer.register_forward_hook(hook, with_kwargs=True)
