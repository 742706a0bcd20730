"""What a layer is made of and what a run is told. Imports no torch, so that `--help` is quick.

Settings come, later ones winning, from the defaults, a TOML file (`moe-bias.toml` in the current
folder, or the file that MOE_BIAS_CONFIG names), `MOE_BIAS_*` variables and the command line.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moe_bias.limits import (
    LARGEST_COUNT,
    LARGEST_NUMBER,
    LARGEST_SIZE,
    LONGEST_ANSWER,
    endless_sampling,
    in_bytes,
    in_short,
    machine_bytes,
)
from moe_bias.mistakes import Interrupted as Interrupted
from moe_bias.mistakes import UserError as UserError
from moe_bias.mistakes import read_text, reason_of, shown

ENV_PREFIX = "MOE_BIAS_"
BUNDLED_MODEL = "bundled"
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Python writes bytes that are no UTF-8 as lone surrogates."""
WEEK = 604800.0
BYTES_OF_A_PROBLEM = 1024
"""About what a problem takes, its question and its prompt."""
MOST_EXPERTS = 2**20
HIGHEST_RANK = 2**16
"""No machine holds a layer of more; what it does hold, `MoEBiasLayer` looks at."""
OWN_SUPPORT = "own"
"""The support that a feature store was extracted on."""


_PATHS = (Path, Path | None)


def _split_at_commas(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _not_empty(value: object) -> object:
    """For a path: Python takes an empty one for the current folder, where a shell's variable was not set."""
    if value == "":
        raise ValueError("it is empty; the current folder is '.'")
    return value


def _listed(value: object) -> object:
    """A key of the settings file that is one number to other commands is a list of one here."""
    return [value] if isinstance(value, int) else _split_at_commas(value)


def _whole_or_word(value: object) -> object:
    """A word that is a whole number as Python writes it, as that number."""
    return int(value) if isinstance(value, str) and re.fullmatch("0|-?[1-9][0-9]{0,18}", value) else value


def _plain(value: object) -> object:
    """NumPy's whole numbers as Python's."""
    return value.__index__() if hasattr(value, "__index__") and not isinstance(value, bool) else value


WholeNumber = Annotated[StrictInt, BeforeValidator(_plain)]
"""A number that is whole by its type: True, 3.0 and '3' are none."""
PositiveInts = Annotated[list[PositiveInt], NoDecode, BeforeValidator(_listed), Field(min_length=1)]
"""A list of positive numbers; in a variable or an option it is written `1,4,16`."""
Seeds = Annotated[list[NonNegativeInt], NoDecode, BeforeValidator(_split_at_commas), Field(min_length=1)]
"""A list of seeds, written `0,1,2`."""
Folders = Annotated[list[Annotated[str, Field(min_length=1)]] | None, NoDecode, BeforeValidator(_split_at_commas)]
"""A list of folders, or None; in a variable or an option it is written `part-1,part-2`."""
TaskOption = Annotated[JsonValue, BeforeValidator(_whole_or_word)]
"""Of what type it is to be, the task says (`tasks.options`); of the command line all but whole numbers are words."""
Names = Annotated[list[Annotated[str, Field(min_length=1)]], NoDecode, BeforeValidator(_split_at_commas)]
"""A list of names, written `static,moe-bias`."""
Normalisation = Literal["standardise", "rms", "none"]
"""How the router sees a hidden state: centred and scaled, divided by its root mean square, or as it is."""
Experts = Literal["free", "directions", "linear"]
"""What an expert is: a bias of its own for each token of the support, a vector in the space of the output
embedding, or such a vector that depends linearly on the hidden state."""
Kinds = Annotated[list[Experts], NoDecode, BeforeValidator(_split_at_commas), Field(min_length=1)]
"""A list of kinds of experts, written `directions,linear`."""
Optimizer = Literal["adamw", "sgd"]
TrainOn = Literal["last-turn", "all-turns"]
"""Which of a conversation's turns of the assistant are answers to learn."""
TRAIN_ON = "which of the assistant's turns in messages are answers to learn: 'last-turn', or 'all-turns'"
Reach = Literal["support", "vocabulary"]
"""Where experts that are made through the output embedding act: on the tokens they were trained on, or on all."""


class LayerConfig(BaseModel):
    """The choices that define one MoE-Bias layer, apart from the sizes of its model.

    `support` lists the token ids that have a bias (None: all of them). `expert_rank` is r of linear experts.
    `free_entries` gives experts that are made through the output embedding entries of their own on the support
    besides. Raises ValidationError, a ValueError, on anything that cannot be built.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_experts: Annotated[WholeNumber, Field(ge=1, le=MOST_EXPERTS)] = 4
    top_k: Annotated[WholeNumber, Field(ge=1)] = 2
    experts: Experts = "linear"
    expert_rank: Annotated[WholeNumber, Field(ge=1, le=HIGHEST_RANK)] = 7
    free_entries: StrictBool = False
    support: tuple[WholeNumber, ...] | None = None
    reach: Reach = "support"
    entropy_gate: StrictBool = True
    load_balance_weight: Annotated[float, Field(ge=0, le=LARGEST_NUMBER)] = 0.01
    strength: Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> LayerConfig:
        _check_top_k(self.top_k, self.num_experts)
        _check_reach(self.reach, self.experts)
        if self.support is not None:
            check_support(self.support)
        return self

    @property
    def rank(self) -> int:
        """r, the rank of each expert's dependence on the hidden state: 0 where the experts are not linear."""
        return self.expert_rank if self.experts == "linear" else 0

    @property
    def has_router(self) -> bool:
        """Whether there is anything to choose: a single expert takes every token."""
        return self.num_experts > 1

    @property
    def through_embedding(self) -> bool:
        """Whether the experts are made through the output embedding."""
        return self.experts != "free"

    @property
    def has_entries(self) -> bool:
        """Whether each expert has an entry of its own for each token of the support."""
        return self.free_entries or not self.through_embedding

    def support_size(self, vocab_size: int) -> int:
        """M, the number of tokens that have a bias."""
        return vocab_size if self.support is None else len(self.support)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError where the support has ids that a vocabulary of this size lacks."""
        if self.support is not None and max(self.support) >= vocab_size:
            raise ValueError(f"support id {max(self.support)} is outside the vocabulary of {vocab_size} tokens")

    def num_parameters(self, hidden_size: int, vocab_size: int) -> int:
        """Trainable parameters: the router's `E D`, the experts' `E (D + 2 r D)` or `E M`, 2 with the entropy gate.

        A single expert has no router.
        """
        router = hidden_size if self.has_router else 0
        vectors = (1 + 2 * self.rank) * hidden_size if self.through_embedding else 0
        entries = self.support_size(vocab_size) if self.has_entries else 0
        return self.num_experts * (router + vectors + entries) + (2 if self.entropy_gate else 0)


def _check_top_k(top_k: int, num_experts: int) -> None:
    """The error's context names the two fields, so that `describe_error` can say where they came from."""
    if top_k > num_experts:
        raise PydanticCustomError(
            "top_k",
            "top_k = {top_k} is more than num_experts = {num_experts}",
            {"top_k": top_k, "num_experts": num_experts},
        )


def _check_reach(reach: Reach, experts: Experts) -> None:
    """The error's context names the two fields, so that `describe_error` can say where they came from."""
    if reach == "vocabulary" and experts == "free":
        raise PydanticCustomError(
            "reach",
            "reach = 'vocabulary' needs experts = 'directions' or 'linear': free entries are of the support alone",
            {"reach": reach, "experts": experts},
        )


def check_support(support: Sequence[int]) -> None:
    """Raises ValueError on an empty support, a negative id or an id that stands twice."""
    if not support:
        raise ValueError("support is empty; give at least one token id, or none at all for the whole vocabulary")
    if min(support) < 0:
        raise ValueError(f"support id {min(support)} is negative")
    token, times = Counter(support).most_common(1)[0]
    if times > 1:
        raise ValueError(f"support id {token} stands more than once")


class Settings(BaseSettings):
    """Base of what every command reads: defaults, then the TOML file, variables, command line."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="ignore",
        allow_inf_nan=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    def texts(self) -> list[str]:
        """Every text in the settings: all that may be a path."""
        return list(_texts(dict(self)))

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_empty_path(cls, value: object, info: ValidationInfo) -> object:
        """Of a path; other texts may be empty."""
        return _not_empty(value) if cls.model_fields[str(info.field_name)].annotation in _PATHS else value

    @field_validator("*", mode="before")
    @classmethod
    def _is_text_of_utf8(cls, value: object) -> object:
        """Refuses what no file, tokenizer or record could take."""
        if any(_UNWRITABLE.search(text) for text in _texts(value)):
            raise ValueError("it has a zero byte in it, or is not UTF-8")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _is_countable(cls, value: object) -> object:
        """Numbers beyond 64 bits, and those of work that would never end, fail somewhere deep within."""
        for number in _numbers(value):
            if isinstance(number, ByteSize):
                if not 0 <= number <= LARGEST_SIZE:
                    raise ValueError(f"a size is from 0 to {in_bytes(LARGEST_SIZE)}")
            elif isinstance(number, int) and abs(number) > LARGEST_COUNT:
                raise ValueError(f"at most {LARGEST_COUNT:,} can be counted to")
            elif isinstance(number, float) and abs(number) > LARGEST_NUMBER:
                raise ValueError(f"at most {LARGEST_NUMBER:g} can be computed with")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What pydantic-settings reads, the first winning; the command line stands in `init_settings`."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, _settings_in(settings_file()))


def _texts(value: object) -> Iterator[str]:
    """Every text in a value, lists and mappings of them included."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _numbers(value: object) -> Iterator[float]:
    """Every number in a value, lists and mappings of them included."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        yield from _numbers([*value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)


class LayerOptions(Settings):
    """The layer, as options of every command that makes one."""

    num_experts: int = Field(4, ge=1, le=MOST_EXPERTS, description="experts E")
    top_k: int = Field(2, ge=1, description="experts that each token is routed to")
    experts: Experts = Field(
        "linear",
        description="what an expert is: 'free' entries, 'directions' in the output embedding's space, or 'linear' ones",
    )
    expert_rank: int = Field(7, ge=1, le=HIGHEST_RANK, description="rank r of linear experts")
    free_entries: bool = Field(False, description="give directions and linear experts free entries besides")
    reach: Reach = Field("support", description="where a trained adapter acts: on its 'support', or the 'vocabulary'")
    load_balance_weight: float = Field(0.01, ge=0, description="weight of the load-balance loss")
    entropy_gate: bool = Field(True, description="scale the bias by sigmoid(alpha H + beta)")

    @model_validator(mode="after")
    def _buildable(self) -> LayerOptions:
        _check_top_k(self.top_k, self.num_experts)
        _check_reach(self.reach, self.experts)
        return self

    def layer_config(self, support: Sequence[int] | None = None) -> LayerConfig:
        """The layer that these settings describe, with `support` as its token ids."""
        return LayerConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            experts=self.experts,
            expert_rank=self.expert_rank,
            free_entries=self.free_entries,
            support=None if support is None else tuple(support),
            reach=self.reach,
            entropy_gate=self.entropy_gate,
            load_balance_weight=self.load_balance_weight,
        )


class LayerSettings(LayerOptions):
    """The `MOE_BIAS_*` variables of the four-line use."""

    enabled: bool = Field(True, description="apply the layer at all")


class ServingSettings(Settings):
    """The `MOE_BIAS_*` variables of the plugin of vLLM; without MOE_BIAS_ADAPTERS it does nothing."""

    adapters: Path | None = Field(None, description="folder of the adapters, one folder each")
    adapter_memory: ByteSize = Field(
        ByteSize(2**30), gt=0, description="memory that loaded adapters may take, such as 1GiB"
    )
    spool: Path | None = Field(
        None, description="folder of record files; without it nothing is kept of requests for training"
    )


class ModelSettings(Settings):
    """Which model, where and in which precision."""

    model: str = Field(BUNDLED_MODEL, description="Hub id, folder, or 'bundled' (SmolLM2-135M-Instruct)")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1'")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights' type")
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


class StartSettings(LayerOptions):
    """What a layer is before it is trained."""

    support: str = Field("auto:4096", description="'auto:M', 'all', or a JSON file of token ids")
    normalisation: Normalisation = Field("standardise", description="how the router sees hidden states")
    gate_alpha: float = Field(1.0, description="where alpha of the entropy gate starts")
    gate_beta: float = Field(0.0, description="where beta of the entropy gate starts")
    seed: int = Field(0, ge=0, description="seed of everything random")


class OptimiserSettings(Settings):
    """How gradients become steps."""

    OPTIMIZERS: ClassVar[dict[Experts, Optimizer]] = {"free": "adamw", "directions": "adamw", "linear": "adamw"}
    """What makes steps of gradients where nothing is said. Free entries of rare tokens have tiny gradients, of which
    AdamW makes full-size steps: where gradients are noisy, as in reinforcement learning, they take SGD."""

    optimizer: Optimizer | None = Field(None, description="AdamW, or SGD with momentum 0.9; none: by the experts' kind")
    EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 2e-2, "directions": 1e-2, "linear": 3e-3}
    """What the experts learn at where nothing is said: a free entry is a logit, the others are multiplied by rows."""
    ROUTER_RATES: ClassVar[dict[Experts, float]] = {"free": 3e-3, "directions": 3e-3, "linear": 1e-2}
    """The same of router, gate and what linear experts read."""

    expert_rate: float | None = Field(None, gt=0, description="learning rate of the experts; none: by their kind")
    entry_rate: float = Field(2e-2, gt=0, description="learning rate of free entries beside other experts")
    router_rate: float | None = Field(
        None, gt=0, description="learning rate of router, gate and what linear experts read; none: by the experts' kind"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps that the rates rise in")
    decay: Literal["linear", "none"] = Field("linear", description="whether the rates then fall to 0")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    weight_decay: float = Field(0.0, ge=0, description="decay of the experts towards 0")

    def optimizer_of(self, experts: Experts) -> Optimizer:
        """The optimiser of experts of a kind."""
        return self.optimizer or self.OPTIMIZERS[experts]

    def rates_of(self, experts: Experts) -> tuple[float, float]:
        """The learning rates of experts of a kind, and of router, gate and what the experts read."""
        return self.expert_rate or self.EXPERT_RATES[experts], self.router_rate or self.ROUTER_RATES[experts]


class TrainingSettings(StartSettings, OptimiserSettings):
    """How a layer is trained on hidden states."""

    epochs: int = Field(4, ge=1, description="passes over the hidden states")
    train_tokens: int | None = Field(None, ge=1, description="train on so many tokens, the first; none: on all")
    batch_tokens: int = Field(512, ge=1, description="tokens in one optimiser step")
    expert_dropout: float = Field(0.0, ge=0, lt=1, description="share of the experts' entries a step leaves out")
    kl_weight: float = Field(0.0, ge=0, description="weight of the exact KL to the base")
    loss_bound: float = Field(100.0, gt=0, description="stop where a step's loss in nats per token is above this")
    logits_budget: ByteSize = Field(
        ByteSize(2**30),
        description="memory to keep base logits in across epochs, such as 1GiB; what does not fit is recomputed",
    )


class RunSettings(TrainingSettings):
    """How a training run is watched."""

    evaluate_every: int = Field(0, ge=0, description="steps between held-out evaluations; 0: once an epoch")
    patience: int = Field(
        0, ge=0, description="evaluations without a better NLL before it stops and keeps the best; 0: never"
    )


class TextSettings(Settings):
    """Prompts and answers, and where hidden states are kept."""

    data: str = Field("", description="JSON Lines file or Hub data set of prompts and answers; or give --store")
    store: Folders = Field(None, description="feature store to take in place of --data; parts as DIR,DIR2")
    features: Path | None = Field(
        None, description="folder that hidden states of --data are kept in; none: one in the user's cache"
    )
    keep_features: bool = Field(True, description="keep hidden states of --data, which later runs then find")
    split: str = Field("train", description="split of a Hub data set")
    train_on: TrainOn = Field("last-turn", description=TRAIN_ON)
    max_length: int = Field(2048, ge=2, description="longer examples are cut here, or at the model's context")
    batch_size: int = Field(16, ge=1, description="examples in one forward pass")

    @model_validator(mode="after")
    def _kept_or_not(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        if self.features and not self.keep_features:
            raise PydanticCustomError(
                "source",
                "--features {features} and --no-keep-features exclude each other; give one",
                {"features": str(self.features), "keep_features": False},
            )
        output = getattr(self, "output", None)
        if self.features and output is not None and os.path.realpath(self.features) == os.path.realpath(output):
            raise PydanticCustomError(
                "source",
                "--features {features} and --output {output} are one folder; give two",
                {"features": str(self.features), "output": str(output)},
            )
        return self


class DataSettings(TextSettings):
    """What to train on, and what to keep out."""

    held_out: float = Field(0.05, gt=0, lt=1, description="share of the examples kept out for measuring")


_OF_TEXTS = ("split", "train_on", "max_length")
"""What makes examples of data."""
_OF_EXTRACTION = (*_OF_TEXTS, "batch_size", "features", "keep_features")
"""What a feature store has settled: given beside one, these would have no effect, but those of texts beside `data`."""


class SupervisedSettings(ModelSettings, RunSettings, DataSettings):
    """A supervised run: the model, the layer and its training, and where hidden states come from.

    Beside `store` a support that is not given is the store's own.
    """

    takes_texts_beside_store: ClassVar[bool] = False
    """Whether `data` may be given with `store`, as the texts that it was extracted from."""

    support: str = Field(
        "auto:4096", description="'auto:M', 'all', or a JSON file of token ids; none beside --store: the store's own"
    )

    @model_validator(mode="after")
    def _from_one_source(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        sources = self._sources()
        given = {name: value for name, value in sources.items() if value}
        if not given:
            *others, last = map(_option, sources)
            raise PydanticCustomError("source", f"one of {', '.join(others)} and {last} is required")
        if len(given) > 1 and not self.takes_texts_beside_store:
            listed = " and ".join(f"{_option(name)} {{{name}}}" for name in given)
            raise PydanticCustomError("source", f"{listed} exclude each other; give one", given)
        for name in _OF_EXTRACTION if self.store else ():
            if name in self.model_fields_set and not (self.data and name in _OF_TEXTS):
                raise PydanticCustomError(
                    "source",
                    f"{_option(name)} {{{name}}} does not apply to --store, which was extracted with its own; leave it "
                    "out, or extract again with it",
                    {name: str(getattr(self, name))},
                )
        return self

    def _sources(self) -> dict[str, str]:
        """What hidden states may come from, by field; "" where it is not given."""
        return {"data": self.data, "store": ",".join(self.store or ())}

    @model_validator(mode="after")
    def _own_support(self) -> Self:
        if self.store and "support" not in self.model_fields_set:
            self.support = OWN_SUPPORT
        return self


class TrainSFTSettings(SupervisedSettings):
    """Train an adapter on prompts and answers by supervised learning."""

    samples: Path | None = Field(
        None, description="output folder of moe-bias eval, whose right answers to train on, in place of --data"
    )
    samples_of: str | None = Field(
        None, min_length=1, description="whose samples those are, a row's name; none: the model's own, 'base'"
    )
    output: Path = Field(description="folder of the adapter; an unfinished run in it is gone on with")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the last checkpoints are kept")

    @field_validator("samples", mode="before")
    @classmethod
    def _not_a_count(cls, value: object) -> object:
        """A key of the settings file is how many samples `eval` takes."""
        return None if isinstance(value, int) else value

    def _sources(self) -> dict[str, str]:
        return {**super()._sources(), "samples": "" if self.samples is None else str(self.samples)}

    @model_validator(mode="after")
    def _of_samples(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        if self.samples_of and not self.samples:
            raise PydanticCustomError(
                "source", "--samples-of {samples_of} needs --samples; give both", {"samples_of": self.samples_of}
            )
        for name in ("split", "train_on") if self.samples else ():
            if name in self.model_fields_set:
                raise PydanticCustomError(
                    "source",
                    f"{_option(name)} {{{name}}} does not apply to --samples; leave it out",
                    {name: str(getattr(self, name))},
                )
        return self


class SweepSettings(SupervisedSettings):
    """Train one layer per cell of a grid on the same hidden states, and compare them."""

    output: Path = Field(description="folder of the cells' records; cells that have one are not run again")
    grid: str = Field(description="settings and their values, such as 'num_experts=4,16 expert_rate=2e-2,5e-2'")
    base: str = Field("", description="the cell to compare with, such as 'num_experts=4'; none: the grid's first")
    seeds: Seeds = Field([0, 1, 2], description="each cell is trained once with each of these seeds")


class ArmsSettings(SupervisedSettings):
    """Train MoE-Bias, parts of it left out, and LoRA on the same tokens, and compare them.

    Beside a store LoRA needs the texts that it was extracted from, as --data.
    """

    takes_texts_beside_store: ClassVar[bool] = True
    output: Path = Field(description="folder of the arms' records; arms that have one are not run again")
    seeds: Seeds = Field([0, 1, 2], description="each arm is trained once with each of these seeds")
    arms: Names = Field([], description="arms to run besides moe-bias, such as static,free; none: all of them")
    lora: bool = Field(True, description="train the arms of LoRA too, which takes by far the longest")
    lora_rank: int = Field(8, ge=1, description="rank r of LoRA")
    lora_rate: float = Field(2e-4, gt=0, description="learning rate of LoRA, decaying linearly")
    lora_head_rate: float = Field(3e-3, gt=0, description="learning rate of LoRA on the output embedding alone")
    lora_batch_size: int = Field(8, ge=1, description="examples in one optimiser step of LoRA")
    lora_tokens: int | None = Field(
        None, ge=1, description="completion tokens that lora-tokens is trained on; none: as many as moe-bias"
    )


class ExtractSettings(ModelSettings):
    """Run the model over a corpus once and keep what training needs of it on disk."""

    data: str = Field(description="JSON Lines file or Hub data set of prompts and answers")
    split: str = Field("train", description="split of a Hub data set")
    train_on: TrainOn = Field("last-turn", description=TRAIN_ON)
    output: Path = Field(description="folder of the feature store; one that was begun there is continued")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type that hidden states are kept in; 'auto': the type the model computes in"
    )
    support: str = Field(
        "auto:4096", description="'auto:M', 'all', a JSON file of token ids, or a feature store whose support to take"
    )
    keep_top: float | None = Field(
        None, gt=0, le=1, description="keep only about this share of the tokens, those of highest base entropy"
    )
    shard: str = Field("1/1", description="extract part i of n of the corpus, written i/n; join parts by listing them")
    shard_tokens: int = Field(32768, ge=1, description="completion tokens that close a file of the store")
    max_length: int = Field(2048, ge=2, description="longer examples are cut here, or at the model's context")
    batch_size: int = Field(16, ge=1, description="examples in one forward pass")

    @field_validator("shard")
    @classmethod
    def _part_of_whole(cls, text: str) -> str:
        number, slash, parts = text.partition("/")
        if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
            raise ValueError("write i/n with i from 1 to n, such as 2/4")
        return text

    @property
    def part(self) -> tuple[int, int]:
        """`shard` as (i, n)."""
        number, _, parts = self.shard.partition("/")
        return int(number), int(parts)


class VerifySettings(Settings):
    """Read a feature store whole and compare the checksums of its shards."""

    store: CliPositionalArg[Path] = Field(description="folder of a feature store")


class TaskSettings(Settings):
    """Problems whose answers a program can check."""

    task: str = Field("products", description="'general_points', or a task of reasoning-gym")
    task_options: dict[str, TaskOption] = Field({}, description="options of the task; --task-options max_terms=3")
    easy: bool = Field(True, description="options that suit models of 135M parameters, where the task has such")
    problems: str = Field("", description="JSON Lines file or Hub data set of problems and answers, in place of --task")
    split: str = Field("train", description="split of a Hub data set")
    question_column: str = Field("", description="column of the questions in --problems; none: its usual names")
    gold_column: str = Field("", description="column of the gold answers, such as reward_model.ground_truth")
    train_problems: int = Field(600, ge=2, description="problems to train on")
    test_problems: int = Field(200, ge=2, description="held-out problems to measure on")

    @model_validator(mode="after")
    def _problems_fit(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        counts = {"train_problems": self.train_problems, "test_problems": self.test_problems}
        _refuse_problems_beyond_memory(counts)
        return self


def _refuse_problems_beyond_memory(counts: Mapping[str, int]) -> None:
    needed, there = BYTES_OF_A_PROBLEM * sum(counts.values()), machine_bytes()
    if there is not None and needed > there:
        raise PydanticCustomError(
            "memory",
            "{count} problems would take {needed} and this machine has {there}; ask for fewer",
            {"count": in_short(sum(counts.values())), "needed": in_bytes(needed), "there": in_bytes(there), **counts},
        )


class RewardSettings(Settings):
    """What a completion is rewarded for."""

    verdict_weight: float = Field(1.0, ge=0, description="weight of a right answer")
    form: str = Field("", description="regular expression that a completion is to match")
    form_weight: float = Field(0.0, ge=0, description="weight of the form")
    reward: str = Field("", description="your own reward, module:function(prompt, completion, gold), from 0 to 1")
    reward_weight: float = Field(0.0, ge=0, description="weight of your own reward")
    overlong_cache: int = Field(0, ge=0, description="tokens before the limit in which the reward falls by 1; 0: none")


class PolicySettings(StartSettings, OptimiserSettings):
    """Reinforcement learning of a layer on the high-entropy minority of tokens."""

    EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 1.0, "directions": 3e-4, "linear": 3e-4}
    ROUTER_RATES: ClassVar[dict[Experts, float]] = {"free": 2e-2, "directions": 3e-4, "linear": 3e-4}
    OPTIMIZERS: ClassVar[dict[Experts, Optimizer]] = {"free": "sgd", "directions": "adamw", "linear": "adamw"}
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps that the rates rise in")
    decay: Literal["linear", "none"] = Field("none", description="whether the rates then fall to 0")
    steps: int = Field(40, ge=1, description="steps: sample, verify, update")
    prompts: int = Field(48, ge=1, description="problems that a step learns from")
    group: int = Field(4, ge=2, description="samples of each problem")
    temperature: float = Field(1.0, description="sampling temperature, above 0")
    top_p: float = Field(1.0, description="only 1: stored log-probabilities are of the whole distribution")
    max_new_tokens: int = Field(128, ge=1, le=LONGEST_ANSWER, description="token limit of an answer")
    batch_size: int = Field(50, ge=1, description="problems in one forward pass")
    sample_budget: ByteSize = Field(ByteSize(2**32), description="memory for the hidden states of a step's samples")
    resamples: int = Field(2, ge=0, description="times that a step samples more problems for those of equal rewards")
    rho: float = Field(0.2, gt=0, le=1, description="share of the tokens to learn from, those of highest entropy")
    epochs: int = Field(4, ge=1, description="passes over a step's tokens")
    batch_tokens: int = Field(1024, ge=1, description="selected tokens in one optimiser step")
    eps_low: float = Field(0.2, ge=0, lt=1, description="how far the ratio may fall below 1")
    eps_high: float = Field(0.28, ge=0, description="how far the ratio may rise above 1")
    kl_weight: float = Field(0.0, ge=0, description="weight of the exact KL to the base")
    kl_bound: float | None = Field(None, gt=0, description="exact KL to the base that no update may exceed, in nats")
    step_kl: float | None = Field(
        2e-2, gt=0, description="exact KL to the policy that sampled that no update may exceed, in nats a token"
    )
    shrink_steps: bool = Field(
        True, description="multiply a step's rates by the share of its problems whose rewards differ"
    )
    entropy_weight: float = Field(0.0, ge=0, description="weight of the policy's entropy as a bonus")
    first_token_only: bool = Field(False, description="the layer acts on the first token of an answer alone")
    equal_steps: int = Field(5, ge=1, description="stop after so many steps in which no group's rewards differ")

    @model_validator(mode="after")
    def _comes_to_an_end(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        answers = {name: getattr(self, name) for name in ("steps", "prompts", "group")}
        sentence = endless_sampling(
            math.prod(answers.values()) * self.max_new_tokens,
            f"{self.steps:,} steps of {self.prompts:,} problems, {self.group:,} answers each of {self.max_new_tokens:,}"
            " tokens",
            "ask for less",
        )
        if sentence is not None:
            raise PydanticCustomError("time", "{sentence}", {"sentence": sentence, **answers})
        return self

    @field_validator("temperature")
    @classmethod
    def _can_be_sampled(cls, value: float) -> float:
        if not value > 0:
            raise ValueError("greedy answers are all alike and teach nothing; give a temperature above 0, such as 1")
        return value

    @field_validator("top_p")
    @classmethod
    def _whole_distribution(cls, value: float) -> float:
        if value != 1:
            raise ValueError("the stored log-probabilities and scalars would be of another distribution; give 1")
        return value


class TrainRLSettings(ModelSettings, TaskSettings, RewardSettings, PolicySettings):
    """Train an adapter by reinforcement learning with verifiable rewards."""

    adapter: str | None = Field(None, description="adapter folder or Hub id to start from; none: a fresh layer")
    output: Path = Field(description="folder of the adapter; an unfinished run in it is gone on with")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="what samples answers to learn from")
    engine_memory: ByteSize = Field(
        ByteSize(2**30), gt=0, description="memory of vLLM's key-value cache in this process"
    )
    endpoint: str = Field(
        "", description="URL of a vLLM server of the same model on this machine, in place of an engine in this process"
    )
    record_margin: float | None = Field(
        None,
        ge=0,
        description="with --engine vllm: keep hidden states only of tokens whose entropy is at most so many nats below "
        "the last step's threshold; none: of all tokens",
    )
    evaluate_every: int = Field(10, ge=1, description="steps between greedy evaluations on the held-out problems")
    show_every: int = Field(10, ge=1, description="steps between samples of text that are shown and kept")
    checkpoint_every: int = Field(1, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the last checkpoints are kept")

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        if self.endpoint and self.engine != "vllm":
            raise PydanticCustomError(
                "engine",
                "--endpoint {endpoint} needs --engine vllm; give both",
                {"endpoint": self.endpoint},
            )
        if self.record_margin is not None and self.engine != "vllm":
            raise PydanticCustomError(
                "engine",
                "--record-margin {record_margin} needs --engine vllm: transformers keeps all hidden states",
                {"record_margin": self.record_margin},
            )
        if self.first_token_only and self.engine == "vllm":
            raise PydanticCustomError(
                "engine",
                "--first-token-only needs --engine transformers: vLLM applies an adapter to whole answers",
                {"first_token_only": True, "engine": self.engine},
            )
        return self


class WarmPolicySettings(TaskSettings, PolicySettings):
    """Reinforcement learning after a supervised phase on worked answers."""

    warm_problems: int = Field(200, ge=0, description="problems of whose worked answers each arm learns the form first")
    warm_epochs: int = Field(20, ge=1, description="passes over their hidden states")
    WARM_EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 1e-1, "directions": 1e-2, "linear": 1e-2}
    warm_expert_rate: float | None = Field(
        None, gt=0, description="learning rate of the experts meanwhile; none: by their kind"
    )
    warm_router_rate: float = Field(3e-3, gt=0, description="learning rate of the router and the gate meanwhile")


class DemoSettings(ModelSettings, RewardSettings, WarmPolicySettings):
    """Train an adapter on the bundled model, from nothing to two measured gains, in minutes."""

    output: Path = Field(Path("moe-bias-demo"), description="folder that the adapter is saved in")
    minutes: float = Field(8.0, gt=0, description="reinforcement learning ends early to keep the whole below this")
    warm_problems: int = Field(100, ge=1, description="worked answers for the supervised phase")
    steps: int = Field(14, ge=1, description="steps of reinforcement learning, where there is time for them")
    max_new_tokens: int = Field(192, ge=1, le=LONGEST_ANSWER, description="token limit of an answer, in every arm")
    resamples: int = Field(0, ge=0, description="times that a step samples more problems for those of equal rewards")


class CompareSettings(ModelSettings, RewardSettings, WarmPolicySettings):
    """Train MoE-Bias, parts of it left out, and LoRA by reinforcement learning on one task, and compare them."""

    resamples: int = Field(0, ge=0, description="0 gives every arm the same number of samples")
    output: Path = Field(description="folder of the arms' records, all of which the table has; none is run again")
    arms: Names = Field([], description="arms to run, such as static,moe-bias; none: all of them")
    seeds: Seeds = Field([0, 1, 2], description="each arm is trained once with each of these seeds")
    shifted_task: str = Field("", description="task to measure on besides; none: the same one with --shifted-options")
    shifted_options: dict[str, TaskOption] = Field({}, description="options of the task that nothing is trained on")
    lora_warm_epochs: int = Field(4, ge=1, description="passes of LoRA over the worked answers in its supervised phase")
    evaluate_every: int = Field(10, ge=1, description="steps between greedy evaluations on the held-out problems")
    lora_rank: int = Field(8, ge=1, description="rank r of LoRA")
    lora_rate: float = Field(1e-4, gt=0, description="learning rate of LoRA, decaying linearly")
    lora_warm_rate: float = Field(2e-4, gt=0, description="learning rate of LoRA in its supervised phase")
    lora_batch_size: int = Field(8, ge=1, description="samples or examples in one backward pass of LoRA")


class AnalyzeSettings(ModelSettings, TextSettings, TaskSettings):
    """Say where adapters change the model, when and how, for tokens of high and of low base entropy apart.

    The text is a feature store (`store`), prompts and answers (`data`), or the frozen model's greedy answers
    to the held-out problems of a task (`task` or `problems`). `data` beside `store` are the texts that it
    was extracted from.
    """

    adapter: Names = Field(min_length=1, description="adapter folders or Hub ids, such as one,two")
    output: Path = Field(description="folder of the analysis; adapters that are done in it are not read again")
    task: str = Field("", description="'general_points', or a task of reasoning-gym, whose answers are looked at")
    held_out: float | None = Field(
        None, gt=0, lt=1, description="only the examples that train sft of this share and --seed kept out"
    )
    seed: int = Field(0, ge=0, description="seed of the problems, or of the held-out examples")
    rho: float = Field(0.2, gt=0, lt=1, description="share of the tokens that are of high base entropy")
    checkpoints: bool = Field(True, description="take the overlap at the checkpoints of an adapter's run too")
    top: int = Field(8, ge=1, description="tokens shown per expert and direction")
    contexts: int = Field(5, ge=0, description="places shown per expert, those where it acts most")
    forks: int = Field(20, ge=0, description="places shown where the choice of token changes, those of largest KL")
    continuation: int = Field(
        24, ge=1, le=LONGEST_ANSWER, description="tokens that both models go on with from such a place"
    )
    max_new_tokens: int = Field(192, ge=1, le=LONGEST_ANSWER, description="token limit of an answer to a problem")

    @property
    def samples_answers(self) -> bool:
        """Whether the text is sampled, in place of given."""
        return bool(self.task or self.problems)

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        given = {"data": self.data, "store": ",".join(self.store or ()), "task": self.task, "problems": self.problems}
        named = {name: value for name, value in given.items() if value}
        if not named:
            raise PydanticCustomError("source", "one of --store, --data, --task and --problems is required")
        if len(named) > 1 and set(named) != {"data", "store"}:
            listed = " and ".join(f"{_option(name)} {{{name}}}" for name in named)
            raise PydanticCustomError("source", f"{listed} exclude each other; give one", dict(named))
        for name in self._idle():
            if name in self.model_fields_set:
                text = "sampled answers" if self.samples_answers else "--store, which was extracted before"
                raise PydanticCustomError(
                    "source",
                    f"{_option(name)} {{{name}}} does not apply to {text}; leave it out",
                    {name: str(getattr(self, name))},
                )
        return self

    def _idle(self) -> Sequence[str]:
        """Settings that would have no effect."""
        if self.samples_answers:
            return ("held_out", "features", "keep_features", "max_length", "train_on")
        return ("features", "keep_features") if self.store else ()


class EvalSettings(ModelSettings):
    """Measure a model and its adapters on benchmarks or tasks; answers are kept and can be graded again."""

    benchmark: str = Field("", description="'aime24', 'aime25', 'amc23', 'math500' or 'gsm8k', from the Hub")
    data: str = Field("", description="JSON Lines file or Hub data set of questions and gold answers")
    split: str = Field("test", description="split of a Hub data set given as --data")
    question_column: str = Field("", description="column of the questions in --data; none: its usual names")
    gold_column: str = Field("", description="column of the gold answers, such as reward_model.ground_truth")
    task: str = Field("", description="'general_points', or a task of reasoning-gym")
    task_options: dict[str, TaskOption] = Field({}, description="options of the task; --task-options max_terms=3")
    easy: bool = Field(True, description="options that suit models of 135M parameters, where the task has such")
    train_problems: int = Field(
        600, ge=0, description="problems of a task to leave out first: those that a run with this seed trains on"
    )
    limit: int | None = Field(
        None, ge=2, description="so many problems, drawn with the seed; none: all of them, and 200 of a task"
    )
    adapter: Names = Field(
        [], description="adapters to measure, folders or Hub ids as A,B; of MoE-Bias or another PEFT method"
    )
    base: bool = Field(True, description="measure the model without an adapter too")
    strength: Annotated[list[float], NoDecode] = Field(
        [], description="measure each adapter at these strengths, such as 0.25,0.5,1; none: at the adapter's own"
    )
    samples: int | None = Field(None, ge=1, description="samples of each problem; none: as usual for the benchmark")
    temperature: float | None = Field(None, ge=0, description="0 is greedy; none: as usual for the benchmark")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the fewest tokens that hold this probability")
    max_new_tokens: int | None = Field(
        None, ge=1, le=LONGEST_ANSWER, description="token limit; none: as usual for the benchmark"
    )
    prompt_template: str = Field(
        "", description="user's turn with {question} in it; none: asks for the answer in a box where a task does not"
    )
    chat: bool = Field(True, description="put the prompt into the chat template")
    seed: int = Field(0, ge=0, description="seed of the samples, and of which problems are drawn")
    batch_size: int = Field(
        64, ge=1, description="answers in one forward pass, or asked for at a time; at least those of one problem"
    )
    output: Path = Field(description="folder of samples and record; a run that was begun there is gone on with")
    regrade: bool = Field(False, description="grade the samples in --output again, without the model")
    endpoint: str = Field("", description="URL of a server that speaks OpenAI's protocol, in place of --model")
    endpoint_model: Names = Field([], description="models there, as A,B; the first is the base of the comparison")
    endpoint_timeout: float = Field(600.0, gt=0, le=WEEK, description="seconds that one request may take")
    endpoint_retries: int = Field(5, ge=0, description="times that a failed request is sent again, ever later")

    @field_validator("strength", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        """A key of the settings file is one number to other commands."""
        return [value] if isinstance(value, int | float) else _split_at_commas(value)

    @field_validator("adapter", "endpoint_model", "strength")
    @classmethod
    def _each_once(cls, names: list[Any]) -> list[Any]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands there twice")
        return names

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        """Errors' contexts name the fields, so that `describe_error` can say where they came from."""
        given = {name: getattr(self, name) for name in ("benchmark", "data", "task") if getattr(self, name)}
        if not given:
            raise PydanticCustomError("source", "one of --benchmark, --data and --task is required")
        _refuse_problems_beyond_memory({"train_problems": self.train_problems, "limit": self.limit or 0})
        if len(given) > 1:
            both = " and ".join(f"{_option(name)} {{{name}}}" for name in given)
            raise PydanticCustomError("source", f"{both} exclude each other; give one", given)
        return self

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        if bool(self.endpoint) != bool(self.endpoint_model):
            raise PydanticCustomError("engine", "--endpoint and --endpoint-model belong together; give both")
        if self.endpoint and self.adapter:
            raise PydanticCustomError(
                "engine",
                "--adapter {adapter} does not apply to --endpoint; name the server's model of it in --endpoint-model",
                {"adapter": ",".join(self.adapter)},
            )
        if self.strength and not self.adapter:
            raise PydanticCustomError(
                "engine",
                "--strength {strength} needs an adapter; name one with --adapter",
                {"strength": ",".join(f"{value:g}" for value in self.strength)},
            )
        if not (self.endpoint or self.base or self.adapter):
            raise PydanticCustomError("engine", "--no-base without --adapter leaves nothing to measure; give --adapter")
        return self


class LmEvalSettings(Settings):
    """Run EleutherAI's lm-evaluation-harness, which knows the method then; all arguments are passed on to it."""


class ServeSettings(ServingSettings):
    """Serve a model and the adapters of a folder by vLLM's server, which speaks OpenAI's protocol."""

    arguments: CliPositionalArg[list[str]] = Field([], description="arguments of vLLM's server, after --")
    model: str = Field(BUNDLED_MODEL, description="Hub id, folder, or 'bundled' (SmolLM2-135M-Instruct)")
    adapters: Path = Field(description="folder of the adapters, one folder each; they may change while it serves")
    served_name: str = Field("", description="the model's name to clients; none: its Hub id, or its folder's name")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of this machine")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights' type")
    cache_memory: ByteSize | None = Field(
        None, gt=0, description="memory of the KV cache, such as 4GiB; none: what vLLM takes, on a CPU 4GiB"
    )


class GenerateSettings(ModelSettings):
    """Answer a prompt with an adapter, streaming, beside the plain model if asked."""

    prompt: CliPositionalArg[str] = Field(description="what to ask")
    adapter: str | None = Field(None, description="adapter folder or Hub id; none: the plain model")
    compare: bool = Field(False, description="show the plain model's answer and the adapted one")
    strength: float | None = Field(None, description="overrides the adapter's strength")
    chat: bool = Field(True, description="put the prompt into the chat template")
    max_new_tokens: int = Field(256, ge=1, le=LONGEST_ANSWER, description="token limit")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    seed: int = Field(0, ge=0, description="seed of sampling")


class ParamsSettings(Settings):
    """What an adapter would cost on a model, for kinds of experts and choices of E and M. Reads only its config."""

    model: str = Field(BUNDLED_MODEL, description="Hub id, folder, or 'bundled'")
    num_experts: PositiveInts = Field([1, 4, 16, 64], description="choices of E, such as 1,16")
    experts: Kinds = Field(["directions", "linear", "free"], description="what an expert is, such as linear,free")
    expert_rank: int = Field(7, ge=1, le=HIGHEST_RANK, description="rank r of linear experts")
    free_entries: bool = Field(False, description="give directions and linear experts free entries besides")
    supports: PositiveInts = Field(
        [1024, 4096, 16384], description="choices of M for free entries; the whole vocabulary is added"
    )
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


class InspectSettings(Settings):
    """Look inside a saved adapter: config, norms, the tokens that each expert moves most, what linear experts read."""

    adapter: CliPositionalArg[str] = Field(description="adapter folder or Hub id")
    top: int = Field(8, ge=1, description="tokens shown per expert and direction")
    readings: int = Field(3, ge=0, description="hidden directions shown that each linear expert reads")
    model: str = Field("", description="the model that it was made on; none: the one that the adapter names")
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


class InspectTextSettings(ModelSettings):
    """Show the plain and the adapted answer to one prompt token by token: entropy, bias, experts, choices."""

    adapter: str = Field(description="adapter folder or Hub id")
    prompt: str = Field(min_length=1, description="what to ask")
    output: Path = Field(Path("tokens.html"), description="page to write; its record is kept beside it as .json")
    chat: bool = Field(True, description="put the prompt into the chat template")
    max_new_tokens: int = Field(256, ge=1, le=LONGEST_ANSWER, description="token limit of each answer")
    top: int = Field(5, ge=1, description="likeliest tokens shown of each distribution")
    rho: float = Field(0.2, gt=0, le=1, description="share of the tokens that is marked, those of highest entropy")

    @field_validator("output")
    @classmethod
    def _is_a_page(cls, path: Path) -> Path:
        if path.suffix != ".html":
            raise ValueError("a page's name ends in .html")
        return path


class ReportSettings(Settings):
    """Make a page, figures and tables of finished runs from their records."""

    runs: CliPositionalArg[list[Annotated[Path, BeforeValidator(_not_empty)]]] = Field(
        min_length=1, description="folders or records of runs of one model"
    )
    output: Path = Field(Path("report"), description="folder of report.html, report.md, figures and tables")
    title: str = Field("", description="heading of the report; none: the runs' names")


def settings_file() -> Path:
    """The TOML file of settings: the one MOE_BIAS_CONFIG names, else `moe-bias.toml` here.

    Raises UserError where MOE_BIAS_CONFIG names no file, the file is no TOML, or it has a key that
    no command knows.
    """
    named = os.environ.get(ENV_PREFIX + "CONFIG")
    path = Path(named or "moe-bias.toml")
    if named and not path.is_file():
        raise UserError(f"MOE_BIAS_CONFIG names {named!r}, which is not a file")
    _refuse_unknown_keys(path)
    return path


def _refuse_unknown_keys(path: Path) -> None:
    known = {name for settings in _subclasses(Settings) for name in settings.model_fields}
    unknown = sorted(set(_settings_in(path)) - known)
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r} in {path}; known keys are {', '.join(sorted(known))}")


def _settings_in(path: Path) -> dict[str, Any]:
    """What a settings file holds, nothing where there is no file. Raises UserError where it is damaged."""
    if not path.is_file() or path.stat().st_size == 0:
        return {}
    text = read_text(path, "the settings file")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {reason_of(error)}") from error


def _subclasses(cls: type[Settings]) -> Iterator[type[Settings]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def describe_error(error: ValidationError, given: Mapping[str, Any] | None = None) -> str:
    """One sentence on the first thing wrong, naming the option, variable or file key it came from.

    `given` holds the values that came from the command line, by field name.
    """
    first = error.errors(include_url=False)[0]
    origin = _origins(error.title, given or {})
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        sources = [f"{name} comes from {origin[name]}" for name in first.get("ctx", {}) if name in origin]
        return f"{reason} ({', '.join(sources)})" if sources else reason
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{_option(key)} is required"
    where = f"{key} from {origin[key]}" if key in origin else key
    return f"{where} is {shown(first['input'])}: {reason[0].lower()}{reason[1:]}"


def describe_unreadable(error: SettingsError) -> str:
    """One sentence on an option or variable of several values that cannot be taken apart."""
    reason = str(error)
    field = re.search(r'value for field "(\w+)"', reason)
    if field is None:
        return reason[0].lower() + reason[1:]
    return f'{field[1]} from {_variable(field[1])} must be written as JSON, such as {{"max_terms": 3}}'


def _origins(title: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Where each field of the settings class of this name was set; fields left alone are not listed."""
    settings = next((child for child in _subclasses(Settings) if child.__name__ == title), None)
    if settings is None:
        return {}
    path = settings_file()
    in_file = _settings_in(path)
    set_variables = {name.upper() for name in os.environ}
    found = {name: str(path) for name in in_file}
    found |= {name: _variable(name) for name in settings.model_fields if _variable(name) in set_variables}
    return found | {name: _option(name) for name in given}


def _variable(field: str) -> str:
    return ENV_PREFIX + field.upper()


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
