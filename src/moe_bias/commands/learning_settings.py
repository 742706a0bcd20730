"""What the commands that serve are told of learning: the fields of its config and of what answers are kept.

An option's name begins with `learn-`, since a server has many things that a rate, a seed or a weight could be of; in
the settings file it is in `[learn]`, without that beginning.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Self

from pydantic import ByteSize, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from moe_bias.commands.option_types import option
from moe_bias.config import Config, LearnConfig, SpoolLimits

BEGINNING = "learn_"
"""What the names begin with."""


def _named_apart() -> dict[str, Any]:
    """The fields of the config by their longer names, as pydantic takes them."""
    return {BEGINNING + name: (field.annotation, copy(field)) for name, field in LearnConfig.model_fields.items()}


if TYPE_CHECKING:
    _OfConfig = Config
else:
    _OfConfig = create_model("_OfConfig", __base__=Config, **_named_apart())


class LearnOptions(_OfConfig):
    """Of a command with the field `learn`, the folder that is learned in, without which none of these says anything."""

    learn_answers: int = Field(10_000, ge=1, description="answers kept to be taught, the last")
    learn_answers_memory: ByteSize = Field(ByteSize(2**29), gt=0, description="memory that they may take")
    learn_answers_minutes: float = Field(60.0, gt=0, description="minutes that an answer is kept")

    def learn_config(self) -> LearnConfig:
        """How it learns."""
        return LearnConfig(**{name: getattr(self, BEGINNING + name) for name in LearnConfig.model_fields})

    def spool_limits(self) -> SpoolLimits:
        """How many answers are kept, in how much memory, and for how long."""
        return SpoolLimits(self.learn_answers, int(self.learn_answers_memory), 60 * self.learn_answers_minutes)

    @model_validator(mode="after")
    def _where_it_learns(self) -> Self:
        """Errors' contexts name the fields, so that a command can say where they came from."""
        if getattr(self, "learn", None) is None:
            for name in LearnOptions.model_fields:
                if name in self.model_fields_set:
                    raise PydanticCustomError(
                        "source",
                        f"{option(name)} {{{name}}} needs --learn, the folder that is learned in; give both",
                        {name: str(getattr(self, name))},
                    )
        return self
