"""Which sizes and values a layer may have: what the machine holds, what a file may say, what stays finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_bias.config import LayerConfig
from moe_bias.layer.entropy import LARGEST_INPUT, at_least_float32
from moe_bias.limits import in_short, refuse_beyond_memory
from moe_bias.mistakes import UserError

LARGEST_OUTPUT = 1e38
"""Moves beyond it are not finite in float32 or bfloat16, or no longer so once they are added to a logit."""
_TINY = torch.finfo(torch.float32).tiny
ROUTER = "router.weight"
"""Files of before have it of a single expert too, where it had no effect."""


def refuse_layer_beyond_memory(config: LayerConfig, hidden_size: int, vocab_size: int) -> None:
    """Raises UserError where the machine does not hold what training such a layer takes, in float32.

    That is its parameters with their gradients and AdamW's two moments, and its table with its gradient.
    """
    parameters, support_size = config.num_parameters(hidden_size, vocab_size), config.support_size(vocab_size)
    table = config.num_experts * (1 + config.rank) * support_size if config.through_embedding else 0
    of_rank = f" of rank {config.rank:,}" if config.rank else ""
    refuse_beyond_memory(
        4 * (4 * parameters + 2 * table),
        f"training {config.num_experts:,} {config.experts} experts{of_rank} on {support_size:,} tokens, "
        f"{in_short(parameters)} parameters,",
        "give fewer experts, a lower rank or a smaller support",
    )


def check_layer_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first tensor of another type or shape, or with values that no layer has."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"adapter tensor {name!r} has type {kind}; it must be a float of 16 bits or more")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"adapter tensor {name!r} has shape {tuple(tensor.shape)}, this model and config need {shapes[name]}"
            )
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise UserError(f"adapter tensor {name!r} holds NaN or infinite values; the file is damaged")
    router = tensors.get(ROUTER)
    if router is not None and not router.is_meta and 0 < at_least_float32(router).abs().max() < _TINY:
        raise UserError(f"adapter tensor {ROUTER!r} holds numbers below 1e-37 alone; the file is damaged")


@torch.no_grad()
def check_layer_values(tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Raises ValueError where a layer of these tensors, by their names in it, could give more than `LARGEST_OUTPUT`.

    The bound is of hidden states and an output embedding up to `LARGEST_INPUT`, each number at its worst sign.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    if not (tensors["hidden_scale"] > 0).all():
        raise UserError("adapter tensor 'hidden_scale', which hidden states are divided by, is not above 0 throughout")
    of = {name: at_least_float32(tensor).abs() for name, tensor in tensors.items()}
    normed_D = (LARGEST_INPUT + of["hidden_mean"]) / of["hidden_scale"]
    bias_E = normed_D.new_zeros(1)
    if "experts" in of:
        bias_E = bias_E + of["experts"].amax(-1)
    if "directions" in of:
        bias_E = bias_E + LARGEST_INPUT * of["directions"].sum(-1)
    if "reads" in of:
        bias_E = bias_E + LARGEST_INPUT * ((of["reads"] @ normed_D) * of["writes"].sum(-1)).sum(-1)
    bounds = {"router": of[ROUTER] @ normed_D} if ROUTER in of else {}
    bounds["bias"] = bias_E * max(abs(strength), 1.0)
    for what, largest in bounds.items():
        if not bool((largest <= LARGEST_OUTPUT).all()):
            raise UserError(
                f"the adapter's values are so large, or its hidden_scale so small, that its {what} could overflow "
                f"({float(largest.max()):.3g} for hidden states of {LARGEST_INPUT:g}); the file or the layer is damaged"
            )
