"""What comparisons are told: arms on the same tokens, and arms on the same problems."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from moe_bias.config.layer import Experts
from moe_bias.config.training import RLConfig, SFTConfig


class ArmsConfig(SFTConfig):
    """MoE-Bias, parts of it left out, and LoRA on the same tokens."""

    lora_rank: int = Field(8, ge=1, description="rank r of LoRA")
    lora_rate: float = Field(2e-4, gt=0, description="learning rate of LoRA, decaying linearly")
    lora_head_rate: float = Field(3e-3, gt=0, description="learning rate of LoRA on the output embedding alone")
    lora_batch_size: int = Field(8, ge=1, description="examples in one optimiser step of LoRA")
    lora_tokens: int | None = Field(
        None, ge=1, description="completion tokens that lora-tokens is trained on; none: as many as moe-bias"
    )


class WarmConfig(RLConfig):
    """Reinforcement learning after a supervised phase on worked answers."""

    warm_problems: int = Field(200, ge=0, description="problems of whose worked answers each arm learns the form first")
    warm_epochs: int = Field(20, ge=1, description="passes over their hidden states")
    WARM_EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 1e-1, "directions": 1e-2, "linear": 1e-2}
    warm_expert_rate: float | None = Field(
        None, gt=0, description="learning rate of the experts meanwhile; none: by their kind"
    )
    warm_router_rate: float = Field(3e-3, gt=0, description="learning rate of the router and the gate meanwhile")


class CompareConfig(WarmConfig):
    """MoE-Bias, parts of it left out, and LoRA by rewards on the same problems."""

    resamples: int = Field(0, ge=0, description="0 gives every arm the same number of samples")
    lora_warm_epochs: int = Field(4, ge=1, description="passes of LoRA over the worked answers in its supervised phase")
    evaluate_every: int = Field(10, ge=1, description="steps between greedy evaluations on the held-out problems")
    lora_rank: int = Field(8, ge=1, description="rank r of LoRA")
    lora_rate: float = Field(1e-4, gt=0, description="learning rate of LoRA, decaying linearly")
    lora_warm_rate: float = Field(2e-4, gt=0, description="learning rate of LoRA in its supervised phase")
    lora_batch_size: int = Field(8, ge=1, description="samples or examples in one backward pass of LoRA")
