"""The point in vLLM where a model's hidden states become logits.

Every model of vLLM makes its logits by one layer, `LogitsProcessor`, called with the output embedding
and exactly the hidden states that it reads; soft-cap and scale are part of that layer. A hook on it
therefore sees hidden states and final logits of all rows of a step, before any grammar masks them. A
model that changes the logits once more after that layer is refused when it has been loaded.

Shapes: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from moe_bias.backbone import HeadTransform
from moe_bias.config import UserError


class HeadReader(Protocol):
    """What follows a model's head."""

    def on_head(self, hidden_BD: Tensor, logits_BV: Tensor, transform: HeadTransform) -> None:
        """Sees each call of the head, and may overwrite the final logits; `transform` has their soft-cap."""
        ...


def head_layer(model: Any, model_config: ModelConfig) -> LogitsProcessor:
    """The layer that makes the model's logits.

    Raises UserError where the model's logits are not that layer's output as it is.
    """
    name = type(model).__name__
    layers = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    made: list[tuple[LogitsProcessor, Any]] = []
    hooks = [layer.register_forward_hook(lambda layer, _, output: made.append((layer, output))) for layer in layers]
    try:
        hidden = torch.zeros(
            1, model_config.get_hidden_size(), dtype=model_config.dtype, device=next(model.parameters()).device
        )
        with torch.inference_mode():
            logits = model.compute_logits(hidden)
    finally:
        for hook in hooks:
            hook.remove()
    if len(made) != 1 or made[0][1] is not logits:
        raise UserError(
            f"{name} changes its logits in a way of its own after the output embedding, which MoE-Bias does not know; "
            "serve it without MOE_BIAS_ADAPTERS"
        )
    return made[0][0]


def follow(layer: LogitsProcessor, reader: HeadReader) -> None:
    """From here on `reader` sees every call of the layer. On ranks that get no logits it sees none."""
    # vLLM caps before it scales.
    transform = HeadTransform(cap=None if layer.soft_cap is None else layer.soft_cap * layer.scale)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor | None) -> None:
        if logits is not None:
            reader.on_head(kwargs["hidden_states"] if "hidden_states" in kwargs else args[1], logits, transform)

    layer.register_forward_hook(hook, with_kwargs=True)
