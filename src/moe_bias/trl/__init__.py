"""MoE-Bias in TRL's trainers: `MoEBiasSFTTrainer`, `MoEBiasDPOTrainer` and `MoEBiasGRPOTrainer`, see `trainers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_bias.extras import need

if TYPE_CHECKING:
    from moe_bias.trl.trainers import MoEBiasDPOTrainer, MoEBiasGRPOTrainer, MoEBiasSFTTrainer

__all__ = ["MoEBiasDPOTrainer", "MoEBiasGRPOTrainer", "MoEBiasSFTTrainer"]


def __getattr__(name: str) -> Any:
    """The trainers, which need TRL. Raises UserError where it is missing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need("trl", "training by TRL's trainers")
    from moe_bias.trl import trainers

    return getattr(trainers, name)
