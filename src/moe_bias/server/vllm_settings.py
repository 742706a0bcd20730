"""What vLLM's server is told of learning, by `moe-bias serve --learn`: JSON in the variable MOE_BIAS_LEARNING."""

from __future__ import annotations

from pathlib import Path

from moe_bias.config import Config, LearnConfig, SpoolLimits


class VllmLearning(Config):
    """Where adapters begin and what is learned is kept, how, who may teach, and whether only this machine may."""

    root: Path
    given: Path
    config: LearnConfig = LearnConfig()
    limits: SpoolLimits = SpoolLimits()
    key_file: Path | None = None
    local: bool = True
