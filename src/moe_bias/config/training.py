"""What training and sampling are told."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import (
    ByteSize,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moe_bias.config.base import Config
from moe_bias.config.layer import Experts, StartOptions
from moe_bias.limits import (
    LONGEST_ANSWER,
    endless_sampling,
)

Optimizer = Literal["adamw", "sgd"]
TrainOn = Literal["last-turn", "all-turns"]
"""Which of a conversation's turns of the assistant are answers to learn."""
Take = Literal["all", "shortest", "shorter"]
"""Which of a problem's right answers are learned: all that differ, the shortest, those up to their median length."""
TRAIN_ON = "which of the assistant's turns in messages are answers to learn: 'last-turn', or 'all-turns'"


class OptimizerOptions(Config):
    """How gradients become steps."""

    OPTIMIZERS: ClassVar[dict[Experts, Optimizer]] = {"free": "adamw", "directions": "adamw", "linear": "adamw"}
    """What makes steps of gradients where nothing is said. Free entries of rare tokens have tiny gradients, of which
    AdamW makes full-size steps: where gradients are noisy, as in reinforcement learning, they take SGD."""

    optimizer: Optimizer | None = Field(None, description="AdamW, or SGD with momentum 0.9; none: by the experts' kind")
    EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 2e-2, "directions": 1e-2, "linear": 3e-3}
    """What the experts learn at where nothing is said: a free entry is a logit, the others are multiplied by rows."""
    ROUTER_RATES: ClassVar[dict[Experts, float]] = {"free": 3e-3, "directions": 3e-3, "linear": 1e-2}
    """The same of router, gate and what linear experts read."""

    expert_rate: float | None = Field(None, gt=0, description="learning rate of the experts; none: by their kind")
    entry_rate: float = Field(2e-2, gt=0, description="learning rate of free entries beside other experts")
    router_rate: float | None = Field(
        None, gt=0, description="learning rate of router, gate and what linear experts read; none: by the experts' kind"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps that the rates rise in")
    decay: Literal["linear", "none"] = Field("linear", description="whether the rates then fall to 0")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    weight_decay: float = Field(0.0, ge=0, description="decay of the experts towards 0")

    def optimizer_of(self, experts: Experts) -> Optimizer:
        """The optimiser of experts of a kind."""
        return self.optimizer or self.OPTIMIZERS[experts]

    def rates_of(self, experts: Experts) -> tuple[float, float]:
        """The learning rates of experts of a kind, and of router, gate and what the experts read."""
        return self.expert_rate or self.EXPERT_RATES[experts], self.router_rate or self.ROUTER_RATES[experts]


class SFTConfig(StartOptions, OptimizerOptions):
    """How a layer is trained on hidden states, by supervised learning or another objective on given answers."""

    epochs: int = Field(4, ge=1, description="passes over the hidden states")
    train_tokens: int | None = Field(None, ge=1, description="train on so many tokens, the first; none: on all")
    batch_tokens: int = Field(512, ge=1, description="tokens in one optimiser step")
    expert_dropout: float = Field(0.0, ge=0, lt=1, description="share of the experts' entries a step leaves out")
    kl_weight: float = Field(0.0, ge=0, description="weight of the exact KL to the base")
    loss_bound: float = Field(100.0, gt=0, description="stop where a step's loss in nats per token is above this")
    logits_budget: ByteSize = Field(
        ByteSize(2**30),
        description="memory to keep base logits in across epochs, such as 1GiB; what does not fit is recomputed",
    )
    evaluate_every: int = Field(0, ge=0, description="steps between held-out evaluations; 0: once an epoch")
    patience: int = Field(
        0, ge=0, description="evaluations without a better NLL before it stops and keeps the best; 0: never"
    )


class DraftConfig(SFTConfig):
    """How a layer on a draft model is brought nearer to a larger model."""

    reverse: float = Field(
        0.0, ge=0, le=1, description="weight of the reverse KL, KL(draft|target), in place of the forward one"
    )

    @field_validator("kl_weight")
    @classmethod
    def _away_from_itself(cls, value: float) -> float:
        if value:
            raise ValueError("it would hold the draft where it is, away from the target; leave it out")
        return value


class RewardConfig(Config):
    """What a completion is rewarded for."""

    verdict_weight: float = Field(1.0, ge=0, description="weight of a right answer")
    form: str = Field("", description="regular expression that a completion is to match")
    form_weight: float = Field(0.0, ge=0, description="weight of the form")
    reward: str = Field(
        "",
        description="your own reward(prompt, completion, gold), from 0 to 1: module:function, or an installed name",
    )
    reward_weight: float = Field(0.0, ge=0, description="weight of your own reward")
    length_penalty: float = Field(
        0.0, ge=0, description="what a right answer, worth 1, loses with every 100 tokens; a wrong one loses nothing"
    )
    token_budget: int = Field(0, ge=0, description="tokens beyond which a right answer is worth nothing; 0: none")
    overlong_cache: int = Field(
        0, ge=0, description="tokens before the limit in which any answer's reward falls by 1; 0: none"
    )


class SamplingConfig(Config):
    """How answers to learn from are sampled."""

    group: int = Field(4, ge=2, description="samples of each problem")
    temperature: float = Field(1.0, description="sampling temperature, above 0")
    top_p: float = Field(1.0, description="only 1: stored log-probabilities are of the whole distribution")
    max_new_tokens: int = Field(128, ge=1, le=LONGEST_ANSWER, description="token limit of an answer")
    batch_size: int = Field(50, ge=1, description="problems in one forward pass")
    sample_budget: ByteSize = Field(ByteSize(2**32), description="memory for the hidden states of a step's samples")

    @field_validator("temperature")
    @classmethod
    def _can_be_sampled(cls, value: float) -> float:
        if not value > 0:
            raise ValueError("greedy answers are all alike and teach nothing; give a temperature above 0, such as 1")
        return value

    @field_validator("top_p")
    @classmethod
    def _whole_distribution(cls, value: float) -> float:
        if value != 1:
            raise ValueError("the stored log-probabilities and scalars would be of another distribution; give 1")
        return value


class RLConfig(SamplingConfig, StartOptions, OptimizerOptions):
    """Reinforcement learning of a layer on the high-entropy minority of tokens."""

    EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 1.0, "directions": 3e-4, "linear": 3e-4}
    ROUTER_RATES: ClassVar[dict[Experts, float]] = {"free": 2e-2, "directions": 3e-4, "linear": 3e-4}
    OPTIMIZERS: ClassVar[dict[Experts, Optimizer]] = {"free": "sgd", "directions": "adamw", "linear": "adamw"}
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps that the rates rise in")
    decay: Literal["linear", "none"] = Field("none", description="whether the rates then fall to 0")
    steps: int = Field(40, ge=1, description="steps: sample, verify, update")
    prompts: int = Field(48, ge=1, description="problems that a step learns from")
    resamples: int = Field(2, ge=0, description="times that a step samples more problems for those of equal rewards")
    rho: float = Field(0.2, gt=0, le=1, description="share of the tokens to learn from, those of highest entropy")
    epochs: int = Field(4, ge=1, description="passes over a step's tokens")
    batch_tokens: int = Field(1024, ge=1, description="selected tokens in one optimiser step")
    logits_budget: ByteSize = Field(
        ByteSize(2**32),
        description="memory to keep the base logits of a step's tokens in; where they do not fit they are recomputed",
    )
    eps_low: float = Field(0.2, ge=0, lt=1, description="how far the ratio may fall below 1")
    eps_high: float = Field(0.28, ge=0, description="how far the ratio may rise above 1")
    kl_weight: float = Field(0.0, ge=0, description="weight of the exact KL to the base")
    kl_bound: float | None = Field(None, gt=0, description="exact KL to the base that no update may exceed, in nats")
    step_kl: float | None = Field(
        2e-2, gt=0, description="exact KL to the policy that sampled that no update may exceed, in nats a token"
    )
    shrink_steps: bool = Field(
        True, description="multiply a step's rates by the share of its problems whose rewards differ"
    )
    entropy_weight: float = Field(0.0, ge=0, description="weight of the policy's entropy as a bonus")
    first_token_only: bool = Field(False, description="the layer acts on the first token of an answer alone")
    equal_steps: int = Field(5, ge=1, description="stop after so many steps in which no group's rewards differ")

    @model_validator(mode="after")
    def _comes_to_an_end(self) -> Self:
        """Errors' contexts name the fields, so that a command can say where they came from."""
        answers = {name: getattr(self, name) for name in ("steps", "prompts", "group")}
        sentence = endless_sampling(
            math.prod(answers.values()) * self.max_new_tokens,
            f"{self.steps:,} steps of {self.prompts:,} problems, {self.group:,} answers each of {self.max_new_tokens:,}"
            " tokens",
            "ask for less",
        )
        if sentence is not None:
            raise PydanticCustomError("time", "{sentence}", {"sentence": sentence, **answers})
        return self
