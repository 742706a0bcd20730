"""What the commands that measure, look, serve and answer are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import CliPositionalArg, NoDecode

from moe_bias.commands.learning_settings import LearnOptions
from moe_bias.commands.option_types import Kinds, Names, PositiveInts, option, split_at_commas
from moe_bias.commands.training_settings import TextSettings
from moe_bias.config import BUNDLED_MODEL, HIGHEST_RANK, Cluster, Config, EvalConfig, ModelConfig, TaskConfig, not_empty
from moe_bias.config.base import each_once
from moe_bias.limits import LONGEST_ANSWER
from moe_bias.variables import ServingVariables

WEEK = 604800.0


class VerifySettings(Config):
    """Read a feature store whole and compare the checksums of its shards."""

    store: CliPositionalArg[Path] = Field(description="folder of a feature store")


class TasksSettings(Config):
    """List the tasks that there are, or show one: its options, and a problem of it with its gold answer."""

    name: CliPositionalArg[str] = Field("", description="the task to show; none: all of them")
    refused: bool = Field(False, description="list those that cannot serve as a reward, and why not")


class AnalyzeSettings(ModelConfig, TextSettings, TaskConfig):
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
    flips: int = Field(20, ge=0, description="places shown where the choice of token changes, those of largest KL")
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
        """Errors' contexts name the fields, so that a command can say where they came from."""
        given = {"data": self.data, "store": ",".join(self.store or ()), "task": self.task, "problems": self.problems}
        named = {name: value for name, value in given.items() if value}
        if not named:
            raise PydanticCustomError("source", "one of --store, --data, --task and --problems is required")
        if len(named) > 1 and set(named) != {"data", "store"}:
            listed = " and ".join(f"{option(name)} {{{name}}}" for name in named)
            raise PydanticCustomError("source", f"{listed} exclude each other; give one", dict(named))
        for name in self._idle():
            if name in self.model_fields_set:
                text = "sampled answers" if self.samples_answers else "--store, which was extracted before"
                raise PydanticCustomError(
                    "source",
                    f"{option(name)} {{{name}}} does not apply to {text}; leave it out",
                    {name: str(getattr(self, name))},
                )
        return self

    def _idle(self) -> Sequence[str]:
        """Settings that would have no effect."""
        if self.samples_answers:
            return ("held_out", "features", "keep_features", "max_length", "train_on")
        return ("features", "keep_features") if self.store else ()


class EvalSettings(EvalConfig, ModelConfig, Cluster):
    """Measure a model and its adapters on benchmarks or tasks; answers are kept and can be graded again."""

    adapter: Names = Field(
        [], description="adapters to measure, folders or Hub ids as A,B; of MoE-Bias or another PEFT method"
    )
    base: bool = Field(True, description="measure the model without an adapter too")
    strength: Annotated[list[float], NoDecode] = Field(
        [], description="measure each adapter at these strengths, such as 0.25,0.5,1; none: at the adapter's own"
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
        """One number, as a settings file may have it, is a list of one."""
        return [value] if isinstance(value, int | float) else split_at_commas(value)

    @field_validator("adapter", "endpoint_model", "strength")
    @classmethod
    def _each_once(cls, names: list[Any]) -> list[Any]:
        return each_once(names)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if not (self.benchmark or self.data or self.task):
            raise PydanticCustomError("source", "one of --benchmark, --data and --task is required")
        if self.endpoint and not self.is_this_process:
            raise PydanticCustomError(
                "source",
                "--endpoint {endpoint} has a server answer; leave out --workers {workers} and --ray {ray}",
                {"endpoint": self.endpoint, "workers": self.workers, "ray": self.ray},
            )
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


class LmEvalSettings(Config):
    """Run EleutherAI's lm-evaluation-harness, which knows the method then; all arguments are passed on to it."""


class ServedSettings(ServingVariables):
    """What is served, where, and by which server."""

    engine: Literal["vllm", "transformers"] = Field("vllm", description="'transformers' needs no vLLM, see chat")
    arguments: CliPositionalArg[list[str]] = Field([], description="arguments of vLLM's server, after --")
    model: str = Field(BUNDLED_MODEL, description="Hub id, folder, GGUF file, or 'bundled' (SmolLM2-135M-Instruct)")
    adapters: Path = Field(description="folder of the adapters, one folder each; they may change while it serves")
    learn: Path | None = Field(None, description="learn from what users say of answers, and keep it in this folder")
    key_file: Path | None = Field(None, description="who may teach which adapter, as for chat")
    served_name: str = Field("", description="the model's name to clients; none: its Hub id, or its folder's name")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of this machine")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights' type")
    cache_memory: ByteSize | None = Field(
        None, gt=0, description="memory of the KV cache, such as 4GiB; none: what vLLM takes, on a CPU 4GiB"
    )


class ServeSettings(LearnOptions, ServedSettings):
    """Serve a model and the adapters of a folder, by vLLM's server or our own; both speak OpenAI's protocol."""


class PageSettings(ModelConfig):
    """What is on the page, and the server behind it."""

    adapters: Path | None = Field(None, description="folder of adapters, one folder each; none: the plain model alone")
    learn: Path | None = Field(
        None,
        description="learn from what users say of answers, and keep it in this folder; --adapters may be left out",
    )
    key_file: Path | None = Field(
        None, description='who may teach: a JSON file {"KEY": "ADAPTER"}; none: whoever is at this machine'
    )
    open: bool = Field(False, description="open the page in the browser")
    served_name: str = Field("", description="the model's name to clients; none: its Hub id, or its folder's name")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of this machine")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    max_new_tokens: int = Field(
        512, ge=1, le=LONGEST_ANSWER, description="token limit of an answer to a request that names none"
    )
    rows: int = Field(8, ge=1, le=1024, description="answers that are written at once; others wait")
    cache_memory: ByteSize = Field(ByteSize(2**30), gt=0, description="memory of conversations that may go on")
    adapter_memory: ByteSize = Field(ByteSize(2**30), gt=0, description="memory that loaded adapters may take")


class ChatSettings(LearnOptions, PageSettings):
    """Try a model with its adapters on a page in the browser: a server of this machine, which needs no vLLM."""


class GenerateSettings(ModelConfig):
    """Answer a prompt with an adapter, streaming, beside the plain model if asked."""

    prompt: CliPositionalArg[str] = Field(description="what to ask")
    adapter: str | None = Field(None, description="adapter folder or Hub id; none: the plain model")
    compare: bool = Field(False, description="show the plain model's answer and the adapted one")
    strength: float | None = Field(None, description="overrides the adapter's strength")
    chat: bool = Field(True, description="put the prompt into the chat template")
    max_new_tokens: int = Field(256, ge=1, le=LONGEST_ANSWER, description="token limit")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    seed: int = Field(0, ge=0, description="seed of sampling")


class ParamsSettings(Config):
    """What an adapter would cost on a model, for kinds of experts and choices of E and M. Reads only its config."""

    model: str = Field(BUNDLED_MODEL, description="Hub id, folder, GGUF file, or 'bundled'")
    num_experts: PositiveInts = Field([1, 4, 16, 64], description="choices of E, such as 1,16")
    experts: Kinds = Field(["directions", "linear", "free"], description="what an expert is, such as linear,free")
    expert_rank: int = Field(7, ge=1, le=HIGHEST_RANK, description="rank r of linear experts")
    free_entries: bool = Field(False, description="give directions and linear experts free entries besides")
    supports: PositiveInts = Field(
        [1024, 4096, 16384], description="choices of M for free entries; the whole vocabulary is added"
    )
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


class InspectSettings(Config):
    """Look inside a saved adapter: config, norms, the tokens that each expert moves most, what linear experts read."""

    adapter: CliPositionalArg[str] = Field(description="adapter folder or Hub id")
    top: int = Field(8, ge=1, description="tokens shown per expert and direction")
    readings: int = Field(3, ge=0, description="hidden directions shown that each linear expert reads")
    model: str = Field("", description="the model that it was made on; none: the one that the adapter names")
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


class InspectTextSettings(ModelConfig):
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


class ReportSettings(Config):
    """Make a page, figures and tables of finished runs from their records."""

    runs: CliPositionalArg[list[Annotated[Path, BeforeValidator(not_empty)]]] = Field(
        min_length=1, description="folders or records of runs of one model"
    )
    output: Path = Field(Path("report"), description="folder of report.html, report.md, figures and tables")
    title: str = Field("", description="heading of the report; none: the runs' names")
