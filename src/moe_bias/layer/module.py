"""The layer as a module: its parameters, and what it makes of hidden states and entropies.

Shapes: T tokens (any leading shape where a docstring says `...`), D hidden size, E experts, R rank,
C coefficients, V vocabulary, M support (M = V without one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bias.config import LayerConfig, Normalisation, Reach
from moe_bias.layer.entropy import at_least_float32
from moe_bias.layer.routing import Routing
from moe_bias.layer.table import EmbeddingRows, Kept, state_of
from moe_bias.layer.values import ROUTER, check_layer_tensors, check_layer_values, refuse_layer_beyond_memory
from moe_bias.mistakes import UserError

_PIECE = 2**26
"""Numbers of an output embedding that a frozen layer's table is made from at once: 256 MiB of float32."""


@dataclass(frozen=True)
class Mixture:
    """Each token's coefficients (..., C) of the layer's table; the entropy gate's weight; the routing."""

    coefficients: Tensor
    weight: Tensor
    routing: Routing


@dataclass(frozen=True)
class LayerOutput:
    """The bias before the strength (..., M), the entropy gate's weight (...,), and the routing."""

    bias: Tensor
    weight: Tensor
    routing: Routing


class MoEBiasLayer(nn.Module):
    """Router, experts and entropy gate, as `moe_bias.layer` defines them.

    Parameters: `router.weight` (E, D), of several experts, as a single one takes every token; `directions` (E, D),
    `writes` and `reads` (E, R, D), the rows of U and V; `experts` (E, M), the free entries; `entropy_gate` alpha and
    beta. Those that the config does not ask for are None. Buffers: `hidden_mean` and `hidden_scale` (D,), the fixed
    normalisation that router and linear experts see h through; `support_ids` (M,) int64 (None: all tokens).

    `reach` tells where the experts act: 'support', or 'vocabulary' for all tokens, whatever the support that they
    were trained on.
    """

    support_ids: Tensor | None
    hidden_mean: Tensor
    hidden_scale: Tensor
    directions: nn.Parameter | None
    writes: nn.Parameter | None
    reads: nn.Parameter | None
    experts: nn.Parameter | None
    router: nn.Linear | None

    def __init__(
        self, config: LayerConfig, hidden_size: int, vocab_size: int, embedding: EmbeddingRows | None = None
    ) -> None:
        """`embedding` is the model's, which experts that are made through it need before the layer can be applied.

        Raises ValueError where the support names ids outside the vocabulary.
        """
        super().__init__()
        config.check_vocabulary(vocab_size)
        refuse_layer_beyond_memory(config, hidden_size, vocab_size)
        self.config = config
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.strength = config.strength
        self.reach: Reach = config.reach
        self.embedding = embedding
        self._kept = Kept()
        experts, rank = config.num_experts, config.rank
        self.router = nn.Linear(hidden_size, experts, bias=False) if config.has_router else None
        has_entries, through = config.has_entries, config.through_embedding
        self.experts = _zeros(experts, config.support_size(vocab_size)) if has_entries else None
        self.directions = _zeros(experts, hidden_size) if through else None
        self.writes = _zeros(experts, rank, hidden_size) if rank else None
        self.reads = _zeros(experts, rank, hidden_size) if rank else None
        self.entropy_gate = nn.Linear(1, 1) if config.entropy_gate else None
        support = None if config.support is None else torch.tensor(config.support, dtype=torch.int64)
        self.register_buffer("support_ids", support, persistent=False)
        self.register_buffer("hidden_mean", torch.zeros(hidden_size))
        self.register_buffer("hidden_scale", torch.ones(hidden_size))
        self.reset_parameters()

    @property
    def support(self) -> Tensor | None:
        """The token ids (M,) that the layer has a bias for now; None: all of them."""
        return None if self.reach == "vocabulary" else self.support_ids

    def support_or_all(self) -> Tensor:
        """The token ids (M,) that the layer has a bias for now, where those are all of them too."""
        return torch.arange(self.vocab_size, device=self.device) if self.support is None else self.support

    @property
    def can_change_support(self) -> bool:
        """Whether the experts have no entries of their own, so that they act on whatever tokens there are."""
        return self.experts is None and self.support is not None

    def change_support(self, support: Sequence[int]) -> None:
        """Acts on other tokens from now on. Raises ValueError on a support that cannot be.

        Only where `can_change_support`.
        """
        assert self.can_change_support, "experts with free entries belong to the tokens that they were made for"
        config = LayerConfig(**{**self.config.model_dump(), "support": tuple(support)})
        config.check_vocabulary(self.vocab_size)
        self.config = config
        self.support_ids = torch.tensor(config.support, dtype=torch.int64, device=self.device)
        self._kept = Kept()

    def forget_derived(self) -> None:
        """Gives back the memory of table and rows, which are made again when they are wanted."""
        self._kept = Kept()

    @property
    def device(self) -> torch.device:
        """Where the layer's parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the layer's parameters."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero biases, a small random router, linear experts that read at random, a gate that starts at sigmoid(H)."""
        for parameter in (self.experts, self.directions, self.writes):
            if parameter is not None:
                parameter.zero_()
        if self.router is not None:
            nn.init.normal_(self.router.weight, std=1 / math.sqrt(self.hidden_size))
        if self.reads is not None:
            nn.init.normal_(self.reads, std=1 / math.sqrt(self.hidden_size))
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

    def normed(self, hidden: Tensor) -> Tensor:
        """`n(h)` for `hidden` (..., D), in float32 or better. No gradient enters `hidden`."""
        hidden = at_least_float32(hidden.detach())
        return (hidden - self.hidden_mean.to(hidden.dtype)) / self.hidden_scale.to(hidden.dtype)

    def route(self, hidden: Tensor) -> Routing:
        """Router probabilities and top-k gates for `hidden` (..., D). No gradient enters `hidden`."""
        return self._routed(self.normed(hidden))

    def _routed(self, normed: Tensor) -> Routing:
        if self.router is None:
            all_of_it = normed.new_ones(*normed.shape[:-1], 1)
            return Routing(all_of_it, all_of_it)
        probs = F.linear(normed, self.router.weight.to(normed.dtype)).softmax(-1)
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
        """Each token's coefficients of the table, for hidden states (..., D) and base entropies (...,).

        Raises ValueError where the layer's values are such that its bias could be infinite or NaN for finite hidden
        states up to `LARGEST_INPUT`. That is looked at once for each state of them, and not in training, where it is
        the loss that is looked at: a look at every token would make a GPU wait.
        """
        self._refuse_overflow()
        normed = self.normed(hidden)
        routing = self._routed(normed)
        weight = self.gate_weight(entropy.to(routing.gates.dtype))
        return Mixture(self._coefficients(normed, routing.gates * weight.unsqueeze(-1)), weight, routing)

    def _coefficients(self, normed: Tensor, shares: Tensor) -> Tensor:
        """Gates times weight (..., E), and after them each times what its expert reads (..., E R)."""
        if self.reads is None:
            return shares
        read = F.linear(normed, self.reads.flatten(0, 1).to(normed.dtype)).unflatten(-1, self.reads.shape[:2])
        return torch.cat([shares, (shares.unsqueeze(-1) * read).flatten(-2)], dim=-1)

    def _refuse_overflow(self) -> None:
        names = ("directions", "writes", "reads", "experts", "hidden_mean", "hidden_scale")
        found = {name: getattr(self, name) for name in names}
        found[ROUTER] = None if self.router is None else self.router.weight
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
        if trained or torch.compiler.is_compiling():
            return
        state = (self.strength, *map(state_of, tensors.values()))
        if state != self._kept.checked_state:
            check_layer_values(tensors, self.strength)
            self._kept.checked_state = state

    def table(self) -> Tensor:
        """P (C, M): what one unit of each coefficient adds to each token's logit. C = E (1 + R); float32 or better
        but for free entries alone, which are the parameter itself.

        Without a gradient to come it is made once, and again when what it is made of has changed. Raises ValueError
        where the experts are made through an output embedding that the layer was not given.
        """
        if self.directions is None:
            assert self.experts is not None
            return self.experts
        if torch.is_grad_enabled() and self.directions.requires_grad:
            self._kept.table = None
            return self._made_table(self._rows())
        if torch.compiler.is_compiling():  # a traced graph would hold the table of when it was traced
            return self._made_table(self._rows())
        parts = (self.directions, self.writes, self.experts)
        state = [state_of(part) for part in parts if part is not None]
        trained = [part for part in parts if part is not None and part.requires_grad]
        make = (lambda: self._made_table(self._rows())) if trained else self._table_in_pieces
        return self._kept.table_of((self.reach, self._embedding_state(), *state), trained, make)

    @property
    def derived(self) -> list[Tensor]:
        """What the layer holds beside its parameters and buffers: its table, and rows of the embedding, once made."""
        return [tensor for tensor in (self._kept.table, self._kept.rows) if tensor is not None]

    def _table_in_pieces(self) -> Tensor:
        """The table from some rows at a time: none are kept, and a whole vocabulary's are never there at once."""
        self._kept.rows = None
        pieces = self.support_or_all().split(max(_PIECE // self.hidden_size, 1))
        return self._with_entries(torch.cat([self._through(self._read_rows(token_M)) for token_M in pieces], dim=-1))

    def _made_table(self, rows_MD: Tensor) -> Tensor:
        return self._with_entries(self._through(rows_MD))

    def _through(self, rows_MD: Tensor) -> Tensor:
        """What the vectors (C, D) of the experts add to the logits of some tokens: (C, M)."""
        assert self.directions is not None
        vectors_CD = self.directions if self.writes is None else torch.cat([self.directions, self.writes.flatten(0, 1)])
        return vectors_CD.to(rows_MD.dtype) @ rows_MD.T

    def _with_entries(self, table_CM: Tensor) -> Tensor:
        if self.experts is None:
            return table_CM
        experts = self.config.num_experts
        entries_EM = self.experts.to(table_CM.dtype)
        if self.reach == "vocabulary":
            entries_EM = self._spread(entries_EM)
        return torch.cat([table_CM[:experts] + entries_EM, table_CM[experts:]])

    def _rows(self) -> Tensor:
        """W_S (M, D) on the layer's device; those of a support are kept."""
        state = (self.reach, self.device, self.dtype, self._embedding_state())
        if self._kept.rows is not None and self._kept.rows_state == state:
            return self._kept.rows
        rows_MD = self._read_rows(self.support)
        if self.support is not None:
            self._kept.rows, self._kept.rows_state = rows_MD, state
        return rows_MD

    def _read_rows(self, token_M: Tensor | None) -> Tensor:
        assert self.embedding is not None
        rows_MD = self.embedding(token_M).to(self.device)
        return rows_MD.to(torch.promote_types(rows_MD.dtype, self.dtype))

    def _embedding_state(self) -> tuple[object, ...]:
        if self.embedding is None:
            raise UserError(
                f"experts = {self.config.experts!r} are made through the model's output embedding, which this layer "
                "was not given: make it with the model's head, find_head(model)[1].layer(config)"
            )
        return self.embedding.state()

    def forward(self, hidden: Tensor, entropy: Tensor) -> LayerOutput:
        """The bias for hidden states (..., D) and base entropies (...,), in float32 or better."""
        mixture = self.mix(hidden, entropy)
        return LayerOutput(self.bias_of(mixture), mixture.weight, mixture.routing)

    def bias_of(self, mixture: Mixture) -> Tensor:
        """The bias (..., M) of coefficients that `mix` gave."""
        return mixture.coefficients @ self.table().to(mixture.coefficients.dtype)

    def on_vocabulary(self, bias: Tensor) -> Tensor:
        """A bias on the tokens that the layer acts on (..., M) as one on the vocabulary (..., V), 0 elsewhere."""
        return bias if self.support is None else self._spread(bias)

    def _spread(self, bias: Tensor) -> Tensor:
        if self.support_ids is None:
            return bias
        return bias.new_zeros(*bias.shape[:-1], self.vocab_size).index_copy(-1, self.support_ids, bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.router is None:
            state_dict.pop(prefix + ROUTER, None)
        own = self.state_dict()
        check_layer_tensors(
            {name: state_dict[prefix + name] for name in own if prefix + name in state_dict},
            {name: tuple(tensor.shape) for name, tensor in own.items()},
        )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))
