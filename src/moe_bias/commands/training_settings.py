"""What the commands that train and extract are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moe_bias.commands.option_types import Folders, Names, Seeds, option
from moe_bias.config import (
    OWN_SUPPORT,
    TRAIN_ON,
    ArmsConfig,
    Cluster,
    CompareConfig,
    Config,
    ModelConfig,
    RewardConfig,
    RLConfig,
    SFTConfig,
    Take,
    TaskConfig,
    TaskOption,
    TrainOn,
    WarmConfig,
)
from moe_bias.limits import LONGEST_ANSWER


class DryRunSettings(Config):
    """A run that can be worked out before it is begun."""

    dry_run: bool = Field(
        False,
        exclude=True,
        description="say what it would hold and how long it would take, and stop",
    )


class TextSettings(Config):
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
        """Errors' contexts name the fields, so that a command can say where they came from."""
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


class SupervisedSettings(ModelConfig, SFTConfig, DataSettings):
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
        """Errors' contexts name the fields, so that a command can say where they came from."""
        sources = self._sources()
        given = {name: value for name, value in sources.items() if value}
        if not given:
            *others, last = map(option, sources)
            raise PydanticCustomError("source", f"one of {', '.join(others)} and {last} is required")
        if len(given) > 1 and not self.takes_texts_beside_store:
            listed = " and ".join(f"{option(name)} {{{name}}}" for name in given)
            raise PydanticCustomError("source", f"{listed} exclude each other; give one", given)
        for name in _OF_EXTRACTION if self.store else ():
            if name in self.model_fields_set and not (self.data and name in _OF_TEXTS):
                raise PydanticCustomError(
                    "source",
                    f"{option(name)} {{{name}}} does not apply to --store, which was extracted with its own; leave it "
                    "out, or extract again with it",
                    {name: str(getattr(self, name))},
                )
        return self

    def _sources(self) -> dict[str, str]:
        """What hidden states may come from, by field; "" where it is not given."""
        return {"data": self.data, "store": ",".join(self.store or ())}

    @model_validator(mode="before")
    @classmethod
    def _own_support(cls, values: Any) -> Any:
        return {"support": OWN_SUPPORT, **values} if values.get("store") else values


class TrainSFTSettings(DryRunSettings, SupervisedSettings):
    """Train an adapter on prompts and answers by supervised learning."""

    samples: Path | None = Field(
        None, description="output folder of moe-bias eval, whose right answers to train on, in place of --data"
    )
    objective: str | None = Field(
        None,
        description="what to minimise: 'supervised', 'dpo' (on rows of prompt, chosen and rejected), or one of your "
        "own as module:name; none: supervised",
    )
    samples_of: str | None = Field(
        None, min_length=1, description="whose samples those are, a row's name; none: the model's own, 'base'"
    )
    samples_take: Take = Field(
        "all",
        description="which right answers of a problem: 'all', the 'shortest', or the 'shorter', up to their median",
    )
    output: Path = Field(description="folder of the adapter; an unfinished run in it is gone on with")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the last checkpoints are kept")

    def _sources(self) -> dict[str, str]:
        return {**super()._sources(), "samples": "" if self.samples is None else str(self.samples)}

    @model_validator(mode="after")
    def _of_samples(self) -> Self:
        """Errors' contexts name the fields, so that a command can say where they came from."""
        for name in ("samples_of", "samples_take"):
            if name in self.model_fields_set and not self.samples:
                raise PydanticCustomError(
                    "source",
                    f"{option(name)} {{{name}}} needs --samples; give both",
                    {name: str(getattr(self, name))},
                )
        for name in ("split", "train_on") if self.samples else ():
            if name in self.model_fields_set:
                raise PydanticCustomError(
                    "source",
                    f"{option(name)} {{{name}}} does not apply to --samples; leave it out",
                    {name: str(getattr(self, name))},
                )
        return self


class SweepSettings(SupervisedSettings):
    """Train one layer per cell of a grid on the same hidden states, and compare them."""

    output: Path = Field(description="folder of the cells' records; cells that have one are not run again")
    grid: str = Field(description="settings and their values, such as 'num_experts=4,16 expert_rate=2e-2,5e-2'")
    base: str = Field("", description="the cell to compare with, such as 'num_experts=4'; none: the grid's first")
    seeds: Seeds = Field([0, 1, 2], description="each cell is trained once with each of these seeds")


class ArmsSettings(SupervisedSettings, ArmsConfig):
    """Train MoE-Bias, parts of it left out, and LoRA on the same tokens, and compare them.

    Beside a store LoRA needs the texts that it was extracted from, as --data.
    """

    takes_texts_beside_store: ClassVar[bool] = True
    output: Path = Field(description="folder of the arms' records; arms that have one are not run again")
    seeds: Seeds = Field([0, 1, 2], description="each arm is trained once with each of these seeds")
    arms: Names = Field([], description="arms to run besides moe-bias, such as static,free; none: all of them")
    lora: bool = Field(True, description="train the arms of LoRA too, which takes by far the longest")


class ExtractSettings(DryRunSettings, ModelConfig, Cluster):
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


class TrainRLSettings(DryRunSettings, ModelConfig, TaskConfig, RewardConfig, RLConfig, Cluster):
    """Train an adapter by reinforcement learning with verifiable rewards."""

    adapter: str | None = Field(None, description="adapter folder or Hub id to start from; none: a fresh layer")
    output: Path = Field(description="folder of the adapter; an unfinished run in it is gone on with")
    objective: str | None = Field(
        None,
        description="what to minimise: 'dapo', or one of your own as module:name; none: dapo, with the clip range and "
        "weights that are given",
    )
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
        """Errors' contexts name the fields, so that a command can say where they came from."""
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
        if self.engine == "vllm" and not self.is_this_process:
            raise PydanticCustomError(
                "engine",
                "--engine vllm samples in one process; leave out --workers {workers} and --ray {ray}",
                {"engine": self.engine, "workers": self.workers, "ray": self.ray},
            )
        if self.first_token_only and self.engine == "vllm":
            raise PydanticCustomError(
                "engine",
                "--first-token-only needs --engine transformers: vLLM applies an adapter to whole answers",
                {"first_token_only": True, "engine": self.engine},
            )
        return self


class DemoSettings(ModelConfig, RewardConfig, TaskConfig, WarmConfig):
    """Train an adapter on the bundled model, from nothing to two measured gains, in minutes."""

    output: Path = Field(Path("moe-bias-demo"), description="folder that the adapter is saved in")
    minutes: float = Field(8.0, gt=0, description="reinforcement learning ends early to keep the whole below this")
    warm_problems: int = Field(100, ge=1, description="worked answers for the supervised phase")
    steps: int = Field(14, ge=1, description="steps of reinforcement learning, where there is time for them")
    max_new_tokens: int = Field(192, ge=1, le=LONGEST_ANSWER, description="token limit of an answer, in every arm")
    resamples: int = Field(0, ge=0, description="times that a step samples more problems for those of equal rewards")


class CompareSettings(DryRunSettings, ModelConfig, RewardConfig, TaskConfig, CompareConfig):
    """Train MoE-Bias, parts of it left out, and LoRA by reinforcement learning on one task, and compare them."""

    output: Path = Field(description="folder of the arms' records, all of which the table has; none is run again")
    arms: Names = Field([], description="arms to run, such as static,moe-bias; none: all of them")
    seeds: Seeds = Field([0, 1, 2], description="each arm is trained once with each of these seeds")
    shifted_task: str = Field("", description="task to measure on besides; none: the same one with --shifted-options")
    shifted_options: dict[str, TaskOption] = Field({}, description="options of the task that nothing is trained on")
