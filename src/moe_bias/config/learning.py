"""How an adapter learns from feedback while it is served, and of how many answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ByteSize, Field

from moe_bias.config.layer import Experts
from moe_bias.config.training import OptimizerOptions
from moe_bias.limits import in_bytes


class LearnConfig(OptimizerOptions):
    """How one lesson becomes an update, what bounds it, and how much is kept. KL is exact, in nats a token."""

    EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 2e-1, "directions": 1e-2, "linear": 1e-2}
    ROUTER_RATES: ClassVar[dict[Experts, float]] = {"free": 1e-2, "directions": 1e-2, "linear": 1e-2}
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps that the rates rise in")
    decay: Literal["linear", "none"] = Field("none", description="whether the rates then fall to 0")
    passes: int = Field(4, ge=1, description="steps on a lesson and those replayed with it")
    replay: int = Field(4, ge=0, description="earlier lessons that are learned again with each new one")
    kept_lessons: int = Field(64, ge=1, description="lessons kept to be replayed; the oldest go")
    held_out_every: int = Field(3, ge=2, description="one lesson of so many is kept to measure by, and never learned")
    held_out_lessons: int = Field(8, ge=1, description="lessons kept to measure by; the oldest go")
    tolerance: float = Field(
        0.0, ge=0, description="how much worse the loss on lessons kept to measure by may get, in nats"
    )
    beta: float = Field(0.1, gt=0, description="of the preference loss between the better answer and the other")
    preference_weight: float = Field(1.0, ge=0, description="weight of that loss beside the better answer's likelihood")
    rho: float = Field(
        0.2, gt=0, le=1, description="share of a rewarded answer's tokens, of highest entropy, that learn"
    )
    step_kl: float = Field(0.5, gt=0, description="exact KL to the version before that no update may exceed, in nats")
    base_kl: float = Field(4.0, gt=0, description="exact KL to the base that no version may exceed, in nats")
    undo_depth: int = Field(8, ge=1, description="versions that can be undone, one after the other")
    lesson_tokens: int = Field(512, ge=1, description="tokens of an answer that are learned from, the first")
    journal_size: ByteSize = Field(
        ByteSize(64 * 2**20), description="growth from which on a journal is cut to what its adapter still needs"
    )
    seed: int = Field(0, ge=0, description="of the choice of lessons to replay")


@dataclass(frozen=True)
class SpoolLimits:
    """How many answers are kept, in how much memory, and for how long."""

    count: int = 10_000
    bytes: int = 2**29
    seconds: float = 3600.0

    def __str__(self) -> str:
        return f"the last {self.count:,} answers of the last {self.seconds / 60:g} minutes, in {in_bytes(self.bytes)}"
