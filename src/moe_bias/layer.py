"""The MoE-Bias layer: routed logit biases, gated by the entropy of the base model.

For a token with hidden state h (the exact input of the output embedding) and base logits z:

    p = softmax(G n(h))                      router probabilities; n is a fixed normalisation
    g_e = p_e / sum_{top-k} p                for the k largest, 0 elsewhere
    w = sigmoid(alpha H + beta)              H: entropy of softmax(z) in nats; w = 1 without the gate
    b = w sum_e g_e B_e                      one row of B per expert, one column per support token
    z' = z + s b                             on the support; z' = z off it

B starts at zero, so a fresh layer changes nothing. The load-balance loss is the one of the Switch
Transformer (arXiv 2101.03961).

Shapes: T tokens (any leading shape where a docstring says `...`), D hidden size, E experts,
V vocabulary, M support (M = V without one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bias.config import LayerConfig, Normalisation, UserError

LOWEST_LOG_PROB = -1e4
"""Log-probabilities are raised to this before `p log p`: exp(-1e4) is 0 in float32 and in float64,
so no value changes, and 0 * -inf cannot arise."""


@dataclass(frozen=True)
class Routing:
    """What the router decided for each token: `probs` and `gates`, both (..., E); gates sum to 1."""

    probs: Tensor
    gates: Tensor


@dataclass(frozen=True)
class Mixture:
    """Each token's share of each expert's bias, gates times weight (..., E); the weight; the routing."""

    shares: Tensor
    weight: Tensor
    routing: Routing


@dataclass(frozen=True)
class LayerOutput:
    """The bias before the strength (..., M), the entropy gate's weight (...,), and the routing."""

    bias: Tensor
    weight: Tensor
    routing: Routing


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged where its type is already wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) over the last axis, in float32 or better, without gradient.

    `logits` (..., V) of any float type; returns (...,). Entries of -inf have probability 0.
    With c = z - max z the entropy is `log sum e^c - sum e^c c / sum e^c`, two terms of one sign, so
    that nothing cancels.
    """
    with torch.no_grad():
        logits = at_least_float32(logits)
        centred = (logits - logits.amax(-1, keepdim=True)).clamp_(min=LOWEST_LOG_PROB)
        mass = centred.exp()
        total = mass.sum(-1)
        entropy: Tensor = total.log() - torch.linalg.vecdot(mass, centred) / total
        return entropy


def itself(tensor: Tensor) -> Tensor:
    """The sum over the processes where there is one."""
    return tensor


def load_balance_loss(
    routing: Routing, counted: Tensor | None = None, total: Callable[[Tensor], Tensor] = itself
) -> Tensor:
    """Switch load-balance loss `E sum_e f_e P_e` (arXiv 2101.03961), a scalar; 1 when uniform.

    `f_e` is the share of routed (token, slot) pairs that go to expert e, `P_e` its mean router
    probability. `counted` (...,) bool names the tokens that count in the loss (default all);
    with none the loss is 0. Where the batch is spread over processes, `total` sums a tensor over
    them, and the result is this process's summand of the loss.
    """
    num_experts = routing.probs.shape[-1]
    probs_TE = routing.probs.reshape(-1, num_experts)
    routed_TE = (routing.gates > 0).reshape(-1, num_experts).to(probs_TE.dtype)
    weight_T = probs_TE.new_ones(len(probs_TE)) if counted is None else counted.flatten().to(probs_TE.dtype)
    routed_E = total(weight_T @ routed_TE)
    share_E = routed_E / routed_E.sum().clamp(min=1)
    mean_E = (weight_T @ probs_TE) / total(weight_T.sum()).clamp(min=1)
    return num_experts * (share_E * mean_E).sum()


class MoEBiasLayer(nn.Module):
    """Router, expert biases and entropy gate, as the module docstring defines them.

    Parameters: `router.weight` (E, D), `experts` (E, M), `entropy_gate` alpha and beta. Buffers:
    `support` (M,) int64 token ids (absent when every token has a bias), `hidden_mean` and
    `hidden_scale` (D,), the fixed normalisation that the router sees h through.
    """

    support: Tensor | None
    hidden_mean: Tensor
    hidden_scale: Tensor

    def __init__(self, config: LayerConfig, hidden_size: int, vocab_size: int) -> None:
        """Raises ValueError where the support names ids outside the vocabulary."""
        super().__init__()
        config.check_vocabulary(vocab_size)
        self.config = config
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.strength = config.strength
        self.router = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.experts = nn.Parameter(torch.zeros(config.num_experts, config.support_size(vocab_size)))
        self.entropy_gate = nn.Linear(1, 1) if config.entropy_gate else None
        support = None if config.support is None else torch.tensor(config.support, dtype=torch.int64)
        self.register_buffer("support", support, persistent=False)
        self.register_buffer("hidden_mean", torch.zeros(hidden_size))
        self.register_buffer("hidden_scale", torch.ones(hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero biases, a small random router, a gate that starts at sigmoid(H)."""
        self.experts.zero_()
        nn.init.normal_(self.router.weight, std=1 / math.sqrt(self.hidden_size))
        if self.entropy_gate is not None:
            self.entropy_gate.weight.fill_(1.0)
            self.entropy_gate.bias.zero_()

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, normalisation: Normalisation = "standardise") -> None:
        """Sets the router's normalisation from `hidden` (..., D), one mean and one scale per dimension.

        'standardise': mean and standard deviation; 'rms': 0 and the root mean square; 'none': 0 and 1.
        Raises ValueError on fewer than two tokens, which have no scale, and on values that are not finite.
        """
        hidden_TD = at_least_float32(hidden.reshape(-1, self.hidden_size))
        if len(hidden_TD) < 2:
            raise UserError(f"calibration needs at least 2 hidden states, got {len(hidden_TD)}")
        if not torch.isfinite(hidden_TD).all():
            raise UserError("the hidden states hold NaN or infinite values; extract them in a wider type")
        self.hidden_mean.zero_()
        self.hidden_scale.fill_(1)
        if normalisation == "standardise":
            self.hidden_mean.copy_(hidden_TD.mean(0))
            self.hidden_scale.copy_(hidden_TD.std(0).clamp(min=1e-6))
        elif normalisation == "rms":
            self.hidden_scale.copy_(hidden_TD.square().mean(0).sqrt().clamp(min=1e-6))

    def route(self, hidden: Tensor) -> Routing:
        """Router probabilities and top-k gates for `hidden` (..., D). No gradient enters `hidden`."""
        hidden = at_least_float32(hidden.detach())
        normed = (hidden - self.hidden_mean.to(hidden.dtype)) / self.hidden_scale.to(hidden.dtype)
        probs = F.linear(normed, self.router.weight.to(hidden.dtype)).softmax(-1)
        top_probs, top_experts = probs.topk(self.config.top_k, dim=-1)
        kept = top_probs / top_probs.sum(-1, keepdim=True)
        return Routing(probs, torch.zeros_like(probs).scatter(-1, top_experts, kept))

    def gate_weight(self, entropy: Tensor) -> Tensor:
        """`sigmoid(alpha H + beta)` for base entropies (...,) in nats, or ones without the gate."""
        if self.entropy_gate is None:
            return torch.ones_like(entropy)
        alpha, beta = self.entropy_gate.weight, self.entropy_gate.bias
        return torch.sigmoid(entropy * alpha.to(entropy.dtype).squeeze() + beta.to(entropy.dtype).squeeze())

    def mix(self, hidden: Tensor, entropy: Tensor) -> Mixture:
        """How much of each expert each token gets, for hidden states (..., D) and base entropies (...,)."""
        routing = self.route(hidden)
        weight = self.gate_weight(entropy.to(routing.gates.dtype))
        return Mixture(routing.gates * weight.unsqueeze(-1), weight, routing)

    def forward(self, hidden: Tensor, entropy: Tensor) -> LayerOutput:
        """The bias for hidden states (..., D) and base entropies (...,), in float32 or better."""
        mixture = self.mix(hidden, entropy)
        shares = mixture.shares
        return LayerOutput(shares @ self.experts.to(shares.dtype), mixture.weight, mixture.routing)

    def on_vocabulary(self, bias: Tensor) -> Tensor:
        """A bias on the support (..., M) as one on the vocabulary (..., V), 0 off the support."""
        if self.support is None:
            return bias
        return bias.new_zeros(*bias.shape[:-1], self.vocab_size).index_copy(-1, self.support, bias)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict()
        check_layer_tensors(
            {name: state_dict[prefix + name] for name in own if prefix + name in state_dict},
            {name: tuple(tensor.shape) for name, tensor in own.items()},
        )
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_layer_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first tensor that has another shape or is not finite."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"adapter tensor {name!r} has shape {tuple(tensor.shape)}, this model and config need {shapes[name]}"
            )
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise UserError(f"adapter tensor {name!r} holds NaN or infinite values; the file is damaged")
