"""What a layer is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    Field,
    StrictBool,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moe_bias.config.base import Config, WholeNumber
from moe_bias.limits import (
    LARGEST_NUMBER,
)

MOST_EXPERTS = 2**20
HIGHEST_RANK = 2**16
"""No machine holds a layer of more; what it does hold, `MoEBiasLayer` looks at."""
OWN_SUPPORT = "own"
"""The support that a feature store was extracted on."""
Normalisation = Literal["standardise", "rms", "none"]
"""How the router sees a hidden state: centred and scaled, divided by its root mean square, or as it is."""
Experts = Literal["free", "directions", "linear"]
"""What an expert is: a bias of its own for each token of the support, a vector in the space of the output
embedding, or such a vector that depends linearly on the hidden state."""
Reach = Literal["support", "vocabulary"]
"""Where experts that are made through the output embedding act: on the tokens they were trained on, or on all."""


class LayerConfig(Config):
    """The choices that define one MoE-Bias layer, apart from the sizes of its model.

    `support` lists the token ids that have a bias (None: all of them). `expert_rank` is r of linear experts.
    `free_entries` gives experts that are made through the output embedding entries of their own on the support
    besides. Raises UserError, a ValueError, on anything that cannot be built.
    """

    num_experts: Annotated[WholeNumber, Field(ge=1, le=MOST_EXPERTS)] = 4
    top_k: Annotated[WholeNumber, Field(ge=1)] = 2
    experts: Experts = "linear"
    expert_rank: Annotated[WholeNumber, Field(ge=1, le=HIGHEST_RANK)] = 7
    free_entries: StrictBool = False
    support: tuple[WholeNumber, ...] | None = None
    reach: Reach = "support"
    entropy_gate: StrictBool = True
    load_balance_weight: Annotated[float, Field(ge=0, le=LARGEST_NUMBER)] = 0.01
    strength: Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> LayerConfig:
        _check_top_k(self.top_k, self.num_experts)
        _check_reach(self.reach, self.experts)
        if self.support is not None:
            check_support(self.support)
        return self

    @property
    def rank(self) -> int:
        """r, the rank of each expert's dependence on the hidden state: 0 where the experts are not linear."""
        return self.expert_rank if self.experts == "linear" else 0

    @property
    def has_router(self) -> bool:
        """Whether there is anything to choose: a single expert takes every token."""
        return self.num_experts > 1

    @property
    def through_embedding(self) -> bool:
        """Whether the experts are made through the output embedding."""
        return self.experts != "free"

    @property
    def has_entries(self) -> bool:
        """Whether each expert has an entry of its own for each token of the support."""
        return self.free_entries or not self.through_embedding

    def support_size(self, vocab_size: int) -> int:
        """M, the number of tokens that have a bias."""
        return vocab_size if self.support is None else len(self.support)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError where the support has ids that a vocabulary of this size lacks."""
        if self.support is not None and max(self.support) >= vocab_size:
            raise ValueError(f"support id {max(self.support)} is outside the vocabulary of {vocab_size} tokens")

    def num_parameters(self, hidden_size: int, vocab_size: int) -> int:
        """Trainable parameters: the router's `E D`, the experts' `E (D + 2 r D)` or `E M`, 2 with the entropy gate.

        A single expert has no router.
        """
        router = hidden_size if self.has_router else 0
        vectors = (1 + 2 * self.rank) * hidden_size if self.through_embedding else 0
        entries = self.support_size(vocab_size) if self.has_entries else 0
        return self.num_experts * (router + vectors + entries) + (2 if self.entropy_gate else 0)


def _check_top_k(top_k: int, num_experts: int) -> None:
    """The error's context names the two fields, so that a command can say where they came from."""
    if top_k > num_experts:
        raise PydanticCustomError(
            "top_k",
            "top_k = {top_k} is more than num_experts = {num_experts}",
            {"top_k": top_k, "num_experts": num_experts},
        )


def _check_reach(reach: Reach, experts: Experts) -> None:
    """The error's context names the two fields, so that a command can say where they came from."""
    if reach == "vocabulary" and experts == "free":
        raise PydanticCustomError(
            "reach",
            "reach = 'vocabulary' needs experts = 'directions' or 'linear': free entries are of the support alone",
            {"reach": reach, "experts": experts},
        )


def check_support(support: Sequence[int]) -> None:
    """Raises ValueError on an empty support, a negative id or an id that stands twice."""
    if not support:
        raise ValueError("support is empty; give at least one token id, or none at all for the whole vocabulary")
    if min(support) < 0:
        raise ValueError(f"support id {min(support)} is negative")
    token, times = Counter(support).most_common(1)[0]
    if times > 1:
        raise ValueError(f"support id {token} stands more than once")


class LayerOptions(Config):
    """The layer, as options of every command that makes one."""

    num_experts: int = Field(4, ge=1, le=MOST_EXPERTS, description="experts E")
    top_k: int = Field(2, ge=1, description="experts that each token is routed to")
    experts: Experts = Field(
        "linear",
        description="what an expert is: 'free' entries, 'directions' in the output embedding's space, or 'linear' ones",
    )
    expert_rank: int = Field(7, ge=1, le=HIGHEST_RANK, description="rank r of linear experts")
    free_entries: bool = Field(False, description="give directions and linear experts free entries besides")
    reach: Reach = Field("support", description="where a trained adapter acts: on its 'support', or the 'vocabulary'")
    load_balance_weight: float = Field(0.01, ge=0, description="weight of the load-balance loss")
    entropy_gate: bool = Field(True, description="scale the bias by sigmoid(alpha H + beta)")

    @model_validator(mode="after")
    def _buildable(self) -> LayerOptions:
        _check_top_k(self.top_k, self.num_experts)
        _check_reach(self.reach, self.experts)
        return self

    def layer_config(self, support: Sequence[int] | None = None) -> LayerConfig:
        """The layer that these settings describe, with `support` as its token ids."""
        choices = {name: getattr(self, name) for name in LayerOptions.model_fields}
        return LayerConfig(**choices, support=None if support is None else tuple(support))


class StartOptions(LayerOptions):
    """What a layer is before it is trained."""

    support: str = Field("auto:4096", description="'auto:M', 'all', or a JSON file of token ids")
    normalisation: Normalisation = Field("standardise", description="how the router sees hidden states")
    gate_alpha: float = Field(1.0, description="where alpha of the entropy gate starts")
    gate_beta: float = Field(0.0, description="where beta of the entropy gate starts")
    seed: int = Field(0, ge=0, description="seed of everything random")
