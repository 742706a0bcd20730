"""What a layer is made of and what training, sampling and measuring are told: plain values, checked.

Nothing here reads variables, files or the command line. Imports no torch, so that `--help` is quick.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

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
from moe_bias.mistakes import UserError, shown

BUNDLED_MODEL = "bundled"
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Python writes bytes that are no UTF-8 as lone surrogates."""
BYTES_OF_A_PROBLEM = 1024
"""About what a problem takes, its question and its prompt."""
MOST_EXPERTS = 2**20
HIGHEST_RANK = 2**16
"""No machine holds a layer of more; what it does hold, `MoEBiasLayer` looks at."""
OWN_SUPPORT = "own"
"""The support that a feature store was extracted on."""
_PATHS = (Path, Path | None)


def not_empty(value: object) -> object:
    """For a path: Python takes an empty one for the current folder, where a shell's variable was not set."""
    if value == "":
        raise ValueError("it is empty; the current folder is '.'")
    return value


def _whole_or_word(value: object) -> object:
    """A word that is a whole number as Python writes it, as that number."""
    return int(value) if isinstance(value, str) and re.fullmatch("0|-?[1-9][0-9]{0,18}", value) else value


def _plain(value: object) -> object:
    """NumPy's whole numbers as Python's."""
    return value.__index__() if hasattr(value, "__index__") and not isinstance(value, bool) else value


WholeNumber = Annotated[StrictInt, BeforeValidator(_plain)]
"""A number that is whole by its type: True, 3.0 and '3' are none."""
TaskOption = Annotated[JsonValue, BeforeValidator(_whole_or_word)]
"""Of what type it is to be, the task says (`tasks.options`); of the command line all but whole numbers are words."""
Normalisation = Literal["standardise", "rms", "none"]
"""How the router sees a hidden state: centred and scaled, divided by its root mean square, or as it is."""
Experts = Literal["free", "directions", "linear"]
"""What an expert is: a bias of its own for each token of the support, a vector in the space of the output
embedding, or such a vector that depends linearly on the hidden state."""
Optimizer = Literal["adamw", "sgd"]
TrainOn = Literal["last-turn", "all-turns"]
"""Which of a conversation's turns of the assistant are answers to learn."""
TRAIN_ON = "which of the assistant's turns in messages are answers to learn: 'last-turn', or 'all-turns'"
Reach = Literal["support", "vocabulary"]
"""Where experts that are made through the output embedding act: on the tokens they were trained on, or on all."""


class Config(BaseModel):
    """Base of all configs: frozen, reads nothing from outside, refuses names that it does not know.

    Raises UserError, a ValueError, in one sentence that names the field and the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(describe(error, type(self))) from error

    def texts(self) -> list[str]:
        """Every text in the config: all that may be a path."""
        return list(_texts(dict(self)))

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_empty_path(cls, value: object, info: ValidationInfo) -> object:
        """Of a path; other texts may be empty."""
        return not_empty(value) if cls.model_fields[str(info.field_name)].annotation in _PATHS else value

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


class LayerConfig(Config):
    """The choices that define one MoE-Bias layer, apart from the sizes of its model.

    `support` lists the token ids that have a bias (None: all of them). `expert_rank` is r of linear experts.
    `free_entries` gives experts that are made through the output embedding entries of their own on the support
    besides. Raises UserError, a ValueError, on anything that cannot be built.
    """

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
    """The error's context names the two fields, so that a command can say where they came from."""
    if top_k > num_experts:
        raise PydanticCustomError(
            "top_k",
            "top_k = {top_k} is more than num_experts = {num_experts}",
            {"top_k": top_k, "num_experts": num_experts},
        )


def _check_reach(reach: Reach, experts: Experts) -> None:
    """The error's context names the two fields, so that a command can say where they came from."""
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


def describe(error: ValidationError, config: type[BaseModel]) -> str:
    """One sentence on the first thing that is wrong with values for a config, naming field and value."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return reason
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{name} is required"
    if first["type"] == "extra_forbidden":
        return f"{config.__name__} has no {name!r}{nearest(name, config.model_fields)}"
    return f"{name} is {shown(first['input'])}: {reason[0].lower()}{reason[1:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on an unknown name: the known one that is nearest to it, or all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    return f"; the nearest is {near[0]!r}" if near else f"; there are {', '.join(known)}"


class LayerOptions(Config):
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


class ModelConfig(Config):
    """Which model, where and in which precision."""

    model: str = Field(BUNDLED_MODEL, description="Hub id, folder, or 'bundled' (SmolLM2-135M-Instruct)")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1'")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights' type")
    trust_remote_code: bool = Field(False, description="run code that the model's repository brings")


class StartOptions(LayerOptions):
    """What a layer is before it is trained."""

    support: str = Field("auto:4096", description="'auto:M', 'all', or a JSON file of token ids")
    normalisation: Normalisation = Field("standardise", description="how the router sees hidden states")
    gate_alpha: float = Field(1.0, description="where alpha of the entropy gate starts")
    gate_beta: float = Field(0.0, description="where beta of the entropy gate starts")
    seed: int = Field(0, ge=0, description="seed of everything random")


class OptimizerOptions(Config):
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


class SFTConfig(StartOptions, OptimizerOptions):
    """How a layer is trained on hidden states, by supervised learning or another objective on given answers."""

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
    evaluate_every: int = Field(0, ge=0, description="steps between held-out evaluations; 0: once an epoch")
    patience: int = Field(
        0, ge=0, description="evaluations without a better NLL before it stops and keeps the best; 0: never"
    )


class TaskConfig(Config):
    """Problems whose answers a program can check."""

    task: str = Field("products", description="a task's name, as moe-bias tasks lists them, or module:name")
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
        """Errors' contexts name the fields, so that a command can say where they came from."""
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


class RewardConfig(Config):
    """What a completion is rewarded for."""

    verdict_weight: float = Field(1.0, ge=0, description="weight of a right answer")
    form: str = Field("", description="regular expression that a completion is to match")
    form_weight: float = Field(0.0, ge=0, description="weight of the form")
    reward: str = Field(
        "",
        description="your own reward(prompt, completion, gold), from 0 to 1: module:function, or an installed name",
    )
    reward_weight: float = Field(0.0, ge=0, description="weight of your own reward")
    overlong_cache: int = Field(0, ge=0, description="tokens before the limit in which the reward falls by 1; 0: none")


class SamplingConfig(Config):
    """How answers to learn from are sampled."""

    group: int = Field(4, ge=2, description="samples of each problem")
    temperature: float = Field(1.0, description="sampling temperature, above 0")
    top_p: float = Field(1.0, description="only 1: stored log-probabilities are of the whole distribution")
    max_new_tokens: int = Field(128, ge=1, le=LONGEST_ANSWER, description="token limit of an answer")
    batch_size: int = Field(50, ge=1, description="problems in one forward pass")
    sample_budget: ByteSize = Field(ByteSize(2**32), description="memory for the hidden states of a step's samples")

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


class RLConfig(SamplingConfig, StartOptions, OptimizerOptions):
    """Reinforcement learning of a layer on the high-entropy minority of tokens."""

    EXPERT_RATES: ClassVar[dict[Experts, float]] = {"free": 1.0, "directions": 3e-4, "linear": 3e-4}
    ROUTER_RATES: ClassVar[dict[Experts, float]] = {"free": 2e-2, "directions": 3e-4, "linear": 3e-4}
    OPTIMIZERS: ClassVar[dict[Experts, Optimizer]] = {"free": "sgd", "directions": "adamw", "linear": "adamw"}
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps that the rates rise in")
    decay: Literal["linear", "none"] = Field("none", description="whether the rates then fall to 0")
    steps: int = Field(40, ge=1, description="steps: sample, verify, update")
    prompts: int = Field(48, ge=1, description="problems that a step learns from")
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
        """Errors' contexts name the fields, so that a command can say where they came from."""
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


class EvalConfig(Config):
    """What a model and its adapters are measured on, and how their answers are sampled."""

    benchmark: str = Field("", description="'aime24', 'aime25', 'amc23', 'math500' or 'gsm8k', from the Hub")
    data: str = Field("", description="JSON Lines file or Hub data set of questions and gold answers")
    split: str = Field("test", description="split of a Hub data set given as --data")
    question_column: str = Field("", description="column of the questions in --data; none: its usual names")
    gold_column: str = Field("", description="column of the gold answers, such as reward_model.ground_truth")
    task: str = Field("", description="a task's name, as moe-bias tasks lists them, or module:name")
    task_options: dict[str, TaskOption] = Field({}, description="options of the task; --task-options max_terms=3")
    easy: bool = Field(True, description="options that suit models of 135M parameters, where the task has such")
    train_problems: int = Field(
        600, ge=0, description="problems of a task to leave out first: those that a run with this seed trains on"
    )
    limit: int | None = Field(
        None, ge=2, description="so many problems, drawn with the seed; none: all of them, and 200 of a task"
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

    @model_validator(mode="after")
    def _problems_fit(self) -> Self:
        """Errors' contexts name the fields, so that a command can say where they came from."""
        given = {name: getattr(self, name) for name in ("benchmark", "data", "task") if getattr(self, name)}
        _refuse_problems_beyond_memory({"train_problems": self.train_problems, "limit": self.limit or 0})
        if len(given) > 1:
            both = " and ".join(f"`{name}` {{{name}}}" for name in given)
            raise PydanticCustomError("source", f"{both} exclude each other; give one", given)
        return self
