"""What a run holds and how much it does, by arithmetic from its sizes alone: nothing is loaded or tried here.

Bytes are those of the tensors that grow with the model, the text and the settings. What a library takes besides, for
its code, for the states between two layers and for room that its allocator keeps, is not in them: a run holds at least
so much. Answers are taken to be as long as they may become.

Sizes: D hidden, V vocabulary, M support, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from moe_bias.backbone import output_embedding
from moe_bias.config import CompareConfig, LayerConfig, OptimizerOptions, RLConfig, SFTConfig, StartOptions
from moe_bias.features.build import SMALL_BYTES as STORED_BYTES
from moe_bias.limits import in_bytes, machine_bytes
from moe_bias.mistakes import UserError
from moe_bias.rollout.cache import ROOM
from moe_bias.rollout.sampling import SCALAR_BYTES as SAMPLING_BYTES
from moe_bias.serving.recording import RowLayout, kept_dtype
from moe_bias.tasks.conversations import Example
from moe_bias.training.problems import CALIBRATION_GROUP, CALIBRATION_PROMPTS
from moe_bias.training.sft import parse_support

Place = Literal["device", "host", "disk"]
"""Where bytes are: the model's device, which on a CPU is the host's memory too; the host's memory; a disk."""
Phase = Literal["always", "supervised", "sampling", "updating", "measuring"]
"""When they are held; of the phases one follows another."""
FLOAT32_BYTES = 4
FEATURE_BYTES = 64
"""Of a token's features all but the hidden state: four int64, two float32, three float64, its answer's number."""
SAMPLED_BYTES = 8
"""Of a token that a step learns from, beside its features: log-probability and advantage."""
ROLLOUT_BYTES = 10
"""Of a sampled token, beside its features: log-probability, the policy's entropy, whether the layer acted, was kept."""
MEASURED_POLICIES = 3
"""Base, start and trained policy answer side by side at a run's end."""


@dataclass(frozen=True)
class Held:
    """So many bytes of something, where and when."""

    what: str
    bytes: int
    place: Place = "device"
    phase: Phase = "always"


@dataclass(frozen=True)
class ModelSize:
    """A model's sizes: `cache_values` are the numbers that keys and values of one token take in all layers.

    Of all linear layers but the output embedding: `linear_ends` are their inputs' and outputs' sizes together,
    `linear_inputs` the numbers of one token that go into them, once where several in one block may read the same.
    """

    parameters: int
    hidden_size: int
    vocab_size: int
    cache_values: int
    dtype: torch.dtype
    linear_ends: int = 0
    linear_inputs: int = 0
    stored_bytes: int | None = None
    """Of the weights, where they are not all in `dtype`."""

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> ModelSize:
        """The sizes of the model of a config of transformers, its weights in `dtype`.

        Raises UserError where that is no causal language model whose layers keep keys and values for every token.
        """
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            cache_values = _cache_values(config)
        except Exception as error:  # the classes of models check their configs by what they raise over them
            raise UserError(f"the sizes of a {type(config).__name__} are not known: {error}") from error
        head: Any = output_embedding(model)
        parameters = model.num_parameters()
        return cls(parameters, head.in_features, head.out_features, cache_values, dtype, *_linear_sizes(model))

    @classmethod
    def loaded(cls, model: Any, dtype: torch.dtype) -> ModelSize:
        """Those of a model that is there, quantised or not; a cache of another kind than keys and values counts 0."""
        try:
            cache_values = _cache_values(model.config)
        except AttributeError:
            cache_values = 0
        head: Any = output_embedding(model)
        stored = model.get_memory_footprint()
        sizes = model.num_parameters(), head.in_features, head.out_features, cache_values
        return cls(*sizes, dtype, *_linear_sizes(model), stored)

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return self.parameters * self.dtype.itemsize if self.stored_bytes is None else self.stored_bytes

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state as samplers keep it."""
        return self.hidden_size * kept_dtype(self.dtype).itemsize

    def cache(self, rows: int, tokens: int) -> int:
        """Bytes of the key-value cache of so many rows of so many tokens."""
        return rows * tokens * self.cache_values * self.dtype.itemsize


def _cache_values(config: Any) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width)


def _linear_sizes(model: nn.Module) -> tuple[int, int]:
    """`linear_ends` and `linear_inputs` of a model."""
    ends, head = 0, output_embedding(model)
    inputs: set[tuple[str, int]] = set()
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            into, out = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            into, out = module.nx, module.nf
        else:
            continue
        ends += into + out
        inputs.add((name.rpartition(".")[0], into))
    return ends, sum(into for _, into in inputs)


@dataclass(frozen=True)
class Sampling:
    """What samples: in vLLM a second copy of the weights, where it is in this process, with a cache of its own."""

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    cache_bytes: int = 0


def layer_of(settings: StartOptions, vocab_size: int) -> LayerConfig:
    """The layer that settings describe, on as many tokens as its support will have; which ones does not matter.

    Raises UserError on a support that cannot be.
    """
    support = parse_support(settings.support, vocab_size)
    size = support if isinstance(support, int) else len(support)
    return settings.layer_config(None if size == vocab_size else range(size))


def layer_bytes(layer: LayerConfig, size: ModelSize, settings: OptimizerOptions) -> int:
    """Weights, gradients and the optimiser's state, in float32: two moments of AdamW, one of SGD."""
    moments = 2 if settings.optimizer_of(layer.experts) == "adamw" else 1
    return (2 + moments) * FLOAT32_BYTES * layer.num_parameters(size.hidden_size, size.vocab_size)


@dataclass(frozen=True)
class PolicyBudget:
    """A run of reinforcement learning whose longest prompt has `prompt_tokens`; `is_fresh`: without an adapter.

    `evaluate_every` is 0 where nothing is measured before the end; then `policies` answer side by side.
    """

    size: ModelSize
    settings: RLConfig
    layer: LayerConfig
    prompt_tokens: int
    test_problems: int
    evaluate_every: int
    sampling: Sampling = Sampling()
    is_fresh: bool = True
    policies: int = MEASURED_POLICIES

    @property
    def step_tokens(self) -> int:
        """Tokens that a step samples at most, where no problem has to be replaced."""
        return self.settings.prompts * self.settings.group * self.settings.max_new_tokens

    @property
    def selected_tokens(self) -> int:
        """Those of them that it learns from."""
        return ceil(self.settings.rho * self.step_tokens)

    @property
    def measured_tokens(self) -> int:
        """Tokens of all greedy answers to held-out problems: in between, and of `policies` at the end."""
        times = self.policies + (self.settings.steps // self.evaluate_every if self.evaluate_every else 0)
        return times * self.test_problems * self.settings.max_new_tokens

    @property
    def calibration_tokens(self) -> int:
        """Tokens that the frozen model samples before the first step, for the support of a fresh layer."""
        return CALIBRATION_PROMPTS * CALIBRATION_GROUP * self.settings.max_new_tokens if self.is_fresh else 0

    @property
    def row_bytes(self) -> int:
        """Bytes that `sample_budget` counts for a sampled token."""
        if self.sampling.engine == "transformers":
            return self.size.hidden_bytes + SAMPLING_BYTES
        return RowLayout.of_model(self.size.hidden_size, self.size.dtype).row.itemsize

    def held(self) -> Iterator[Held]:
        """All that is held, one thing after the other."""
        settings, size, support = self.settings, self.size, self.layer.support_size(self.size.vocab_size)
        yield Held("weights", size.weights)
        yield Held("layer, gradients, optimiser", layer_bytes(self.layer, size, settings))
        if self.sampling.engine == "vllm":
            yield Held("weights in vLLM", size.weights)
            yield Held("key-value cache in vLLM", self.sampling.cache_bytes)
        rows = self._rows()
        if rows:
            yield Held(f"key-value cache of {rows:,} answers", self._cache(rows), phase="sampling")
            logits = 2 * FLOAT32_BYTES * rows * size.vocab_size
            yield Held("logits of these, base and adapted", logits, phase="sampling")
        rows = self.policies * min(settings.batch_size, self.test_problems)
        yield Held(f"key-value cache of {rows:,} answers, measuring", self._cache(rows), phase="measuring")
        recorded = self.step_tokens * (size.hidden_bytes + FEATURE_BYTES + ROLLOUT_BYTES)
        yield Held("recorded rows of a step", recorded, "host", "sampling")
        yield Held("the rows of groups that teach", recorded, "host", "sampling")
        selected = self.selected_tokens * (size.hidden_bytes + FEATURE_BYTES + SAMPLED_BYTES)
        yield Held("rows that a step learns from", selected, phase="updating")
        logits = FLOAT32_BYTES * self.selected_tokens * support
        yield Held("their base logits", logits if logits <= settings.logits_budget else 0, phase="updating")

    def refusal(self) -> str | None:
        """What the first step would be refused for, or None."""
        needed = self.step_tokens * self.row_bytes
        if needed <= self.settings.sample_budget:
            return None
        budget = in_bytes(self.settings.sample_budget)
        return f"`sample_budget` {budget} does not hold the {in_bytes(needed)} that a step may record"

    def _rows(self) -> int:
        """Answers that transformers samples at once; with vLLM only for the support of a fresh layer."""
        calibrating = CALIBRATION_GROUP * min(self.settings.batch_size, CALIBRATION_PROMPTS) if self.is_fresh else 0
        if self.sampling.engine != "transformers":
            return calibrating
        return max(self.settings.group * min(self.settings.batch_size, self.settings.prompts), calibrating)

    def _cache(self, rows: int) -> int:
        return self.size.cache(rows, self.prompt_tokens + self.settings.max_new_tokens + ROOM)


@dataclass(frozen=True)
class LoRABudget:
    """LoRA on all linear layers: on worked answers first, then by rewards with TRL (`by_rewards`), or on more of them.

    `prompt_tokens` has the longest prompt, `worked_tokens` the longest worked answer with its prompt, 0 where none is
    learned from. `token_bytes` is what a forward pass keeps of a token for the backward pass, as it was measured; the
    inputs of the linear layers where it was not, which are less. TRL holds all answers of a step up to the longest.
    """

    size: ModelSize
    settings: CompareConfig
    prompt_tokens: int
    worked_tokens: int
    test_problems: int
    by_rewards: bool = True
    token_bytes: int | None = None

    @property
    def parameters(self) -> int:
        """P: of each linear layer its inputs and outputs by the rank."""
        return self.settings.lora_rank * self.size.linear_ends

    @property
    def samples(self) -> int:
        """Answers of a step."""
        return self.settings.prompts * self.settings.group

    def held(self) -> Iterator[Held]:
        """All that is held, one thing after the other."""
        settings, size = self.settings, self.size
        yield Held("weights", size.weights)
        yield Held("LoRA, gradients, optimiser", 4 * FLOAT32_BYTES * self.parameters)  # PEFT keeps it in float32
        length = self.prompt_tokens + settings.max_new_tokens
        states = "inputs of linear layers" if self.token_bytes is None else "states"
        if self.worked_tokens:
            held = self._states(self.worked_tokens)
            yield Held(f"{states}, a micro-batch of worked answers", held, phase="supervised")
        if self.by_rewards:
            cache, logits = size.cache(self.samples, length), 2 * FLOAT32_BYTES * self.samples * size.vocab_size
            yield Held(f"key-value cache of {self.samples:,} answers", cache, phase="sampling")
            yield Held("logits and probabilities of these", logits, phase="sampling")
            yield Held(f"{states}, a micro-batch", self._states(length), phase="updating")
            logits = 2 * size.dtype.itemsize * self._rows * settings.max_new_tokens * size.vocab_size
            yield Held("logits of a micro-batch, their gradient", logits, phase="updating")
        rows = min(settings.batch_size, self.test_problems)
        yield Held(
            f"key-value cache of {rows:,} answers, measuring", size.cache(rows, length + ROOM), phase="measuring"
        )

    @property
    def _rows(self) -> int:
        return self.settings.lora_batch_size

    def _states(self, length: int) -> int:
        kept = self.size.linear_inputs * self.size.dtype.itemsize if self.token_bytes is None else self.token_bytes
        return self._rows * length * kept


@dataclass(frozen=True)
class Text:
    """A corpus: completion tokens, and those that go through the model, prompts counted."""

    tokens: int
    through: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Text:
        """That of these examples."""
        return cls(sum(len(example.completion_ids) for example in examples), sum(map(len, examples)))

    def share(self, part: float) -> Text:
        """As much of it, or a multiple."""
        return Text(round(part * self.tokens), round(part * self.through))


@dataclass(frozen=True)
class StoreBudget:
    """A feature store of a corpus whose hidden states are kept in `dtype`, a share of the tokens or all."""

    size: ModelSize
    text: Text
    dtype: torch.dtype
    keep_top: float = 1.0

    def held(self) -> Iterator[Held]:
        """All that is held, one thing after the other."""
        yield Held("weights", self.size.weights)
        width = self.size.hidden_size * self.dtype.itemsize + STORED_BYTES
        yield Held("feature store", round(self.text.tokens * self.keep_top) * width, "disk")


@dataclass(frozen=True)
class SupervisedBudget:
    """Supervised training on a store."""

    store: StoreBudget
    settings: SFTConfig
    layer: LayerConfig
    train_tokens: int

    @property
    def seen_tokens(self) -> int:
        """Tokens of all passes together."""
        return self.settings.epochs * self.train_tokens

    def held(self) -> Iterator[Held]:
        """All that is held, one thing after the other."""
        size = self.store.size
        yield from self.store.held()
        yield Held("layer, gradients, optimiser", layer_bytes(self.layer, size, self.settings))
        logits = FLOAT32_BYTES * self.train_tokens * self.layer.support_size(size.vocab_size)
        yield Held("base logits", logits if logits <= self.settings.logits_budget else 0)


@dataclass(frozen=True)
class DraftBudget:
    """Training of a draft, `own` without its target, whose hidden states of the same answers are stored too."""

    own: SupervisedBudget
    target: StoreBudget

    def held(self) -> Iterator[Held]:
        """All that is held, one thing after the other."""
        for name, held in (("draft", self.own.held()), ("target", self.target.held())):
            for one in held:
                is_of_both = one.what in ("weights", "feature store", "base logits")
                yield replace(one, what=f"{one.what} of the {name}") if is_of_both else one
        yield Held("base logits of the target", self._target_logits)

    @property
    def _target_logits(self) -> int:
        """Those on the support, which are kept where the draft's leave room for them."""
        support = self.own.layer.support_size(self.own.store.size.vocab_size)
        logits = FLOAT32_BYTES * self.own.train_tokens * support
        return logits if 2 * logits <= self.own.settings.logits_budget else 0


def peak(held: Sequence[Held], places: Sequence[Place]) -> int:
    """The most bytes that are held at one time in these places together."""
    phases = {one.phase for one in held} | {"always"}
    return max(
        sum(one.bytes for one in held if one.place in places and one.phase in ("always", phase)) for phase in phases
    )


@dataclass(frozen=True)
class Memory:
    """Memory there is, in these places together; None where the system does not tell."""

    places: tuple[Place, ...]
    name: str
    bytes: int | None


def memories(device: torch.device) -> list[Memory]:
    """Those of a model's device and of the machine."""
    if device.type == "cpu":
        return [Memory(("device", "host"), "memory", machine_bytes())]
    return [Memory(("device",), str(device), memory_of(device)), Memory(("host",), "memory", machine_bytes())]


def memory_of(device: torch.device) -> int | None:
    """The memory of a device, used or not."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_bytes()


def beyond_memory(held: Sequence[Held], device: torch.device) -> str | None:
    """What of the memory there is does not hold it all, or None."""
    for memory in memories(device):
        needed = peak(held, memory.places)
        if memory.bytes is not None and needed > memory.bytes:
            return f"{in_bytes(needed)} at one time, and there are {in_bytes(memory.bytes)} in {memory.name}"
    return None
