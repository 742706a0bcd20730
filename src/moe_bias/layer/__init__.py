"""The MoE-Bias layer: routed logit biases, gated by the entropy of the base model.

For a token with hidden state h (the exact input of the output embedding) and base logits z:

    p = softmax(G n(h))                      router probabilities; n is a fixed normalisation
    g_e = p_e / sum_{top-k} p                for the k largest, 0 elsewhere
    w = sigmoid(alpha H + beta)              H: entropy of softmax(z) in nats; w = 1 without the gate
    b = w sum_e g_e (W_S (c_e + U_e V_e n(h)) + B_e)
    z' = z + s b                             on the support; z' = z off it

W_S are the output embedding's rows of the support's tokens: the model's own, and never kept with the layer.
c_e (D,) is a direction in its space, U_e and V_e make the direction depend on the hidden state with rank r,
B_e (M,) are free entries. A layer has those parts that its config names. All but V start at zero, so a
fresh layer changes nothing.

Whatever the parts, b is a thin product: with the table P = [W_S c + B; W_S U] (C, M), C = E (1 + r), and the
coefficients a = w [g; g V n(h)] (T, C) of each token, b = a P. `table` and `mix` make the two, and all
that applies, trains, samples or reads a layer starts from them. The plain reference is `plain_bias`.

The load-balance loss is the one of the Switch Transformer (arXiv 2101.03961).

Shapes: T tokens (any leading shape where a docstring says `...`), D hidden size, E experts, R rank,
C coefficients, V vocabulary, M support (M = V without one).
"""

from moe_bias.layer.entropy import (
    LARGEST_INPUT,
    LOWEST_LOG_PROB,
    at_least_float32,
    entropy_from_logits,
    entropy_in_pieces,
    in_type,
)
from moe_bias.layer.module import LayerOutput, Mixture, MoEBiasLayer
from moe_bias.layer.reference import plain_bias
from moe_bias.layer.routing import Routing, itself, load_balance_loss
from moe_bias.layer.table import EmbeddingRows
from moe_bias.layer.values import (
    LARGEST_OUTPUT,
    ROUTER,
    check_layer_tensors,
    check_layer_values,
    refuse_layer_beyond_memory,
)

__all__ = [
    "LARGEST_INPUT",
    "LARGEST_OUTPUT",
    "LOWEST_LOG_PROB",
    "ROUTER",
    "EmbeddingRows",
    "LayerOutput",
    "Mixture",
    "MoEBiasLayer",
    "Routing",
    "at_least_float32",
    "check_layer_tensors",
    "check_layer_values",
    "entropy_from_logits",
    "entropy_in_pieces",
    "in_type",
    "itself",
    "load_balance_loss",
    "plain_bias",
    "refuse_layer_beyond_memory",
]
