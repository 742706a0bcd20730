"""The plain reference of the layer's bias, which tests hold the fast path against."""

from __future__ import annotations

from torch import Tensor

from moe_bias.layer.module import MoEBiasLayer


def plain_bias(layer: MoEBiasLayer, hidden_TD: Tensor, entropy_T: Tensor, rows_MD: Tensor) -> Tensor:
    """The plain reference of the layer's bias (T, M): each expert's direction, token by token, through the embedding.

    `rows_MD` is the output embedding's weight on the layer's support.
    """
    normed_TD = layer.normed(hidden_TD)
    gates_TE, weight_T = layer.route(hidden_TD).gates, layer.gate_weight(entropy_T)
    bias_TM = normed_TD.new_zeros(len(hidden_TD), len(rows_MD))
    for token in range(len(hidden_TD)):
        for expert in range(layer.config.num_experts):
            direction_D = normed_TD.new_zeros(layer.hidden_size)
            if layer.directions is not None:
                direction_D = direction_D + layer.directions[expert]
            if layer.writes is not None and layer.reads is not None:
                direction_D = direction_D + layer.writes[expert].T @ (layer.reads[expert] @ normed_TD[token])
            expert_M = rows_MD @ direction_D
            if layer.experts is not None:
                expert_M = expert_M + layer.experts[expert]
            bias_TM[token] = bias_TM[token] + weight_T[token] * gates_TE[token, expert] * expert_M
    return bias_TM
