"""The adapter's config as PEFT sees it.

`PeftType` is a closed enum; a string that behaves like a member stands in for ours. A
`target_modules` field naming the output embedding would make PEFT save the whole embedding, so the
config has no such field.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_bias.adapter.card import write_card
from moe_bias.adapter.embedding import check_embedding, embedding_sample
from moe_bias.config import LayerConfig, describe
from moe_bias.layer import EmbeddingRows
from moe_bias.mistakes import UserError, read_json, reading

Size = Annotated[int, Field(ge=1, lt=2**31)]
"""A side of the output embedding."""


class _MoEBiasType(str):
    """Stands where PEFT expects a member of its enum `PeftType`; hashes and compares as its text."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return "MOE_BIAS"

    @property
    def name(self) -> str:
        return "MOE_BIAS"

    def __str__(self) -> str:
        return "PeftType.MOE_BIAS"


class _Facts(BaseModel):
    """Fields of a config that say what an adapter was made on."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool
    fork_coverage: Annotated[float, Field(ge=0, le=1)] | None
    hidden_size: Size | None
    vocab_size: Size | None
    embedding_sample: Annotated[list[float], Field(min_length=1)] | None


PEFT_TYPE = _MoEBiasType("MOE_BIAS")
_OF_MODEL = ("hidden_size", "vocab_size", "embedding_sample")
"""What a config learns of its model."""


@dataclass
class MoEBiasConfig(PeftConfig):
    """Settings of one adapter, and what was measured when it was made.

    `support` lists the token ids that have a bias (None: all), `reach` tells whether the experts act on them alone.
    `experts` is their kind; a config that knows its model's sizes but not their kind was written before there
    were others than free ones. `fork_coverage` is the share of the base's probability mass at forks that the
    support holds on held-out text. `hidden_size` and `vocab_size` are those of the model it was made for, and
    `embedding_sample` some entries of its output embedding; they are filled in when it is attached. Raises
    ValueError, in one sentence, on anything that cannot be built.
    """

    task_type: str | None = "CAUSAL_LM"
    num_experts: int = 4
    top_k: int = 2
    experts: str | None = None
    expert_rank: int = 7
    free_entries: bool = False
    support: list[int] | None = None
    reach: str = "support"
    entropy_gate: bool = True
    load_balance_weight: float = 0.01
    strength: float = 1.0
    fork_coverage: float | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    embedding_sample: list[float] | None = None

    target_modules = None  # not a field: see the module docstring
    _checked: ClassVar[tuple[object, LayerConfig] | None] = None  # an instance has its own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> MoEBiasConfig:
        """As PEFT's, but raises UserError, in one sentence, on a file that is damaged or holds no such config."""
        with reading(f"the config of the adapter {str(pretrained_model_name_or_path)!r}"):
            config: MoEBiasConfig = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            return config

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._check_facts()
        if self.experts is None:
            self.experts = LayerConfig.model_fields["experts"].default if self.hidden_size is None else "free"
        layer = self.layer_config()
        self.support = None if layer.support is None else list(layer.support)
        self._given = {name: getattr(self, name) for name in _OF_MODEL}
        self._is_attached = False

    def _check_facts(self) -> None:
        """Raises UserError on a field, apart from the layer's own, that holds another type than it should."""
        try:
            _Facts(**{name: getattr(self, name) for name in _Facts.model_fields})
        except ValidationError as error:
            raise UserError(describe(error, _Facts)) from error

    def layer_config(self) -> LayerConfig:
        """The choices that define the layer. Raises ValueError naming the offending value.

        They are checked once: to look at a support of thousands of tokens takes milliseconds.
        """
        choices = {name: getattr(self, name) for name in LayerConfig.model_fields}
        support = tuple(self.support) if isinstance(self.support, list) else self.support
        key = [(type(value), value) for value in {**choices, "support": support}.values()]  # True is 1, and is refused
        if self._checked is not None and key == self._checked[0]:
            return self._checked[1]
        config = LayerConfig(**choices)
        self.__dict__["_checked"] = key, config
        return config

    def for_model(self, hidden_size: int, vocab_size: int, rows: EmbeddingRows | None = None) -> MoEBiasConfig:
        """A copy that knows its model's sizes and, from `rows`, a sample of its output embedding.

        Raises ValueError where it was made for other sizes, or on an output embedding unlike this one; warns where
        the embedding differs by more than rounding, as a quantised copy does.
        """
        ours, theirs = (self.hidden_size, self.vocab_size), (hidden_size, vocab_size)
        for name, made_for, has in zip(("hidden_size", "vocab_size"), ours, theirs, strict=True):
            if made_for is not None and made_for != has:
                raise UserError(f"this adapter was made for {name} {made_for}, the model has {has}")
        self.layer_config().check_vocabulary(vocab_size)
        config = copy.copy(self)
        config.hidden_size, config.vocab_size = theirs
        found = None if rows is None else embedding_sample(rows, hidden_size, vocab_size)
        if found is not None:
            if self.embedding_sample is None:
                config.embedding_sample = found.tolist()
            else:
                check_embedding(self.embedding_sample, found, self.layer_config().through_embedding)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields of a config file. Raises ValueError where it is no JSON object, or a field stands twice."""
        if not isinstance(read_json(Path(path_json_file), "config"), dict):
            raise UserError(f"{str(path_json_file)!r} holds no JSON object")
        fields: dict[str, Any] = super().from_json_file(path_json_file, **kwargs)
        return fields

    def attached(self, hidden_size: int, vocab_size: int, rows: EmbeddingRows) -> MoEBiasConfig:
        """The config itself, which then knows its model; for a second model a copy of what it was before the first.

        PEFT's users expect `model.peft_config["default"] is config`. Raises ValueError as `for_model` does.
        """
        config = copy.copy(self) if self._is_attached else self
        for name, value in self._given.items() if self._is_attached else ():
            setattr(config, name, value)
        fitted = config.for_model(hidden_size, vocab_size, rows)
        for name in _OF_MODEL:
            setattr(config, name, getattr(fitted, name))
        config._is_attached = True
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the config, and a model card beside it that says what the adapter is."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), self.to_dict())
