"""What a layer is made of and what training, sampling and measuring are told: plain values, checked.

Nothing here reads variables, files or the command line, and nothing imports torch, so that `--help` is quick.
"""

from __future__ import annotations

from moe_bias.config.base import Config, WholeNumber, describe, nearest, not_empty
from moe_bias.config.cluster import Cluster
from moe_bias.config.experiments import ArmsConfig, CompareConfig, WarmConfig
from moe_bias.config.labels import LabelArm, LabelsConfig
from moe_bias.config.layer import (
    HIGHEST_RANK,
    MOST_EXPERTS,
    OWN_SUPPORT,
    Experts,
    LayerConfig,
    LayerOptions,
    Normalisation,
    Reach,
    StartOptions,
    check_support,
)
from moe_bias.config.learning import LearnConfig, SpoolLimits
from moe_bias.config.measuring import BUNDLED_MODEL, BYTES_OF_A_PROBLEM, EvalConfig, ModelConfig, TaskConfig, TaskOption
from moe_bias.config.training import (
    TRAIN_ON,
    DraftConfig,
    Optimizer,
    OptimizerOptions,
    RewardConfig,
    RLConfig,
    SamplingConfig,
    SFTConfig,
    Take,
    TrainOn,
)

__all__ = [
    "BUNDLED_MODEL",
    "BYTES_OF_A_PROBLEM",
    "HIGHEST_RANK",
    "MOST_EXPERTS",
    "OWN_SUPPORT",
    "TRAIN_ON",
    "ArmsConfig",
    "Cluster",
    "CompareConfig",
    "Config",
    "DraftConfig",
    "EvalConfig",
    "Experts",
    "LabelArm",
    "LabelsConfig",
    "LayerConfig",
    "LayerOptions",
    "LearnConfig",
    "ModelConfig",
    "Normalisation",
    "Optimizer",
    "OptimizerOptions",
    "RLConfig",
    "Reach",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "SpoolLimits",
    "StartOptions",
    "Take",
    "TaskConfig",
    "TaskOption",
    "TrainOn",
    "WarmConfig",
    "WholeNumber",
    "check_support",
    "describe",
    "nearest",
    "not_empty",
]
