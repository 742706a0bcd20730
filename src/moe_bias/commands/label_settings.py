"""What `moe-bias labels` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveFloat
from pydantic_settings import NoDecode

from moe_bias.commands.option_types import PositiveInts, Seeds, split_at_commas
from moe_bias.config import LabelArm, LabelsConfig, ModelConfig


class LabelsSettings(LabelsConfig, ModelConfig):
    """Choose among labels by the token after a prompt: zero-shot, calibrated, static bias, a probe, MoE-Bias, LoRA."""

    data: str = Field(min_length=1, description="JSON Lines file or Hub data set of texts and labels")
    output: Path = Field(description="folder of the record and the adapters; what is done in it is not run again")
    label_counts: PositiveInts = Field([16, 64, 256, 1024], description="labelled texts to learn from, as 16,64")
    seeds: Seeds = Field([0, 1, 2], description="each seed draws other texts to learn from, as 0,1")
    arms: Annotated[list[LabelArm], NoDecode, BeforeValidator(split_at_commas)] = Field(
        [], description="ways to compare, such as logistic,moe-bias,lora; none: all but lora"
    )
    lora_counts: PositiveInts = Field([64, 256], description="labelled texts that LoRA learns from")
    lora_seeds: Seeds = Field([0], description="seeds that LoRA is run with")
    lora_rates: Annotated[list[PositiveFloat], NoDecode, BeforeValidator(split_at_commas), Field(min_length=1)] = Field(
        [2e-4, 1e-3], description="learning rates of LoRA to choose from by a fold of the labelled texts"
    )
