"""What a comparison of ways to choose among labels is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from moe_bias.config.base import Config, WholeNumber, each_once

LabelArm = Literal["zero-shot", "contextual", "divided", "static", "logistic", "probe", "moe-bias", "lora"]
"""Ways to choose among labels; `moe_bias.experiments.label_arms` says what each is."""
Count = Annotated[WholeNumber, Field(ge=1)]
Seed = Annotated[WholeNumber, Field(ge=0)]


class LabelsConfig(Config):
    """How ways to choose among labels are compared: texts, prompt, numbers of labels, and what LoRA is given."""

    split: str = Field("train", description="split of a Hub data set")
    text_column: str = Field("text", description="column of the texts")
    label_column: str = Field("label", description="column of the labels, which are words")
    template: str = Field(
        "{text}\n\nAnswer with one of these: {labels}.", description="prompt with {text} and {labels} in it"
    )
    chat: bool = Field(True, description="put the prompt into the chat template")
    label_counts: list[Count] = Field([16, 64, 256, 1024], min_length=1, description="labelled texts to learn from")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="each seed draws other texts to learn from")
    test_texts: int = Field(500, ge=2, description="texts to measure on, which nothing is learnt from")
    folds: int = Field(3, ge=2, le=20, description="parts of the labelled texts in cross-validation")
    arms: list[LabelArm] = Field([], description="ways to compare; none: all but lora")
    lora_counts: list[Count] = Field([64, 256], description="labelled texts that LoRA learns from")
    lora_seeds: list[Seed] = Field([0], description="seeds that LoRA is run with")
    lora_rank: int = Field(8, ge=1, description="rank r of LoRA")
    lora_rates: list[Annotated[float, Field(gt=0)]] = Field(
        [2e-4, 1e-3], min_length=1, description="learning rates of LoRA to choose from by a fold of the labelled texts"
    )
    lora_epochs: int = Field(8, ge=1, description="passes of LoRA over the labelled texts")
    lora_batch_size: int = Field(8, ge=1, description="texts in one step of LoRA")
    max_length: int = Field(512, ge=2, description="texts whose prompts are longer, in tokens, are left out")
    batch_size: int = Field(16, ge=1, description="texts in one forward pass")

    @field_validator("template")
    @classmethod
    def _has_places(cls, template: str) -> str:
        for place in ("{text}", "{labels}"):
            if place not in template:
                raise ValueError(f"it has no {place} in it")
        return template

    @field_validator("label_counts", "seeds", "arms", "lora_counts", "lora_seeds", "lora_rates")
    @classmethod
    def _each_once(cls, values: list[object]) -> list[object]:
        return each_once(values)
