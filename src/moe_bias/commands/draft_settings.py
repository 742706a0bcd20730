"""What `moe-bias train draft` is told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moe_bias.commands.option_types import option
from moe_bias.commands.training_settings import DryRunSettings, SupervisedSettings
from moe_bias.config import DraftConfig
from moe_bias.limits import LONGEST_ANSWER


class TrainDraftSettings(DryRunSettings, DraftConfig, SupervisedSettings):
    """Train an adapter that makes a small model a better draft of a larger one, for speculative decoding."""

    takes_texts_beside_store: ClassVar[bool] = True

    target: str = Field(min_length=1, description="the larger model, of the same vocabulary: Hub id, folder, GGUF file")
    target_features: Path | None = Field(
        None, description="folder that the target's hidden states are kept in; none: one in the user's cache"
    )
    own_samples: Literal["target", "draft"] | None = Field(
        None,
        description="whose answers to the prompts to train on, 'target' or 'draft'; none: the data's own",
    )
    max_new_tokens: int = Field(256, ge=1, le=LONGEST_ANSWER, description="token limit of an own sample")
    temperature: float = Field(1.0, ge=0, description="temperature of own samples; 0: greedy")
    adapter: str | None = Field(
        None,
        description="adapter folder or Hub id to start from, which own samples of the draft are under; none: a "
        "fresh layer",
    )
    output: Path = Field(description="folder of the adapter; an unfinished run in it is gone on with")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the last checkpoints are kept")

    @model_validator(mode="after")
    def _of_texts(self) -> Self:
        """Errors' contexts name the fields, so that a command can say where they came from."""
        if not self.data:
            raise PydanticCustomError("source", "--data is required: the target reads the texts", {"data": self.data})
        if self.own_samples and self.store:
            raise PydanticCustomError(
                "source",
                "--own-samples {own_samples} and --store {store} exclude each other; give one",
                {"own_samples": self.own_samples, "store": ",".join(self.store)},
            )
        if self.features and self.features == self.target_features:
            raise PydanticCustomError(
                "source",
                "--features and --target-features are both {features}; give two folders",
                {"features": str(self.features), "target_features": str(self.target_features)},
            )
        for name in ("max_new_tokens", "temperature"):
            if name in self.model_fields_set and not self.own_samples:
                raise PydanticCustomError(
                    "source",
                    f"{option(name)} {{{name}}} needs --own-samples; give both",
                    {name: str(getattr(self, name))},
                )
        return self
