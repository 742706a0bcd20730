"""Making a feature store: one pass of the frozen model over a corpus, shard by shard.

A shard is a run of consecutive examples, so what it holds depends on them and on the settings alone,
not on what was done before: that is why a killed run, continued, ends with the same bytes. Within a
shard the examples go through the backbone sorted by length, so that little is padded, and are written
in the order of the corpus. Hidden states are rounded to the stored type first and the scalars taken
from the rounded ones: what training multiplies anew then belongs to the same distribution.

What depends on the base distribution as a whole is chosen before the first shard on a calibration
sample, examples evenly spaced over the whole corpus without those held out, the same for every part of it:

- a support 'auto:M': the ids that must be in, then the corpus's completion tokens by frequency, then
  by fork mass on the sample (`support_for`);
- the threshold of `keep_top`: the (1 - rho) quantile of base entropy over the sample, to four digits so
  that machines that round differently agree. Tokens at or above it are kept. The share
  that this keeps of the corpus is near rho, not equal to it, and is in the manifest.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_bias.backbone import Head
from moe_bias.chunks import longest_first
from moe_bias.features.extract import (
    base_entropies,
    completion_hidden,
    evenly_spaced,
    measure_fork_mass,
    place_in_example,
    support_for,
    token_scalars,
)
from moe_bias.features.fingerprint import ModelFacts, corpus_hash
from moe_bias.features.manifest import Manifest, Recipe, ids_hash
from moe_bias.features.writer import StoreFolder
from moe_bias.limits import in_time
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.progress import Meter, meter
from moe_bias.support import VocabularySplit, fork_threshold, split_vocabulary
from moe_bias.tasks.conversations import Corpus, Example

SHARD_TOKENS = 32768
ESTIMATE_BATCHES = 3
"""After as many batches the time expected is said."""
SMALL_BYTES = 60
"""Bytes a token of all but its hidden state: three int64, two float32, three float64, its share of headers."""


@dataclass(frozen=True)
class Choices:
    """How a store is to be made. `part` i of n; `keep_top` is a share in (0, 1], None keeps all tokens.

    `support` is a number of ids to choose, `always` among them, or the ids themselves. Rows of the
    source that are `held_out` are extracted like the others, but have no say in what is chosen.
    """

    support: int | list[int]
    always: Sequence[int] = ()
    hidden_dtype: torch.dtype = torch.float32
    part: tuple[int, int] = (1, 1)
    keep_top: float | None = None
    shard_tokens: int = SHARD_TOKENS
    batch_size: int = 16
    held_out: Sequence[int] = ()

    @property
    def calibrates(self) -> bool:
        """Whether anything is to be chosen."""
        return isinstance(self.support, int) or self.keep_top is not None


@dataclass(frozen=True)
class ShardTexts:
    """What a shard is made of: its examples, and their rows in the source."""

    rows: list[int]
    examples: list[Example]


@dataclass(frozen=True)
class Plan:
    """What a run will do: the examples of its part with their rows, cut into shards.

    `sample` are the examples to calibrate on, `targets` (T,) the completion tokens, of all parts without
    what is held out.
    """

    recipe: Recipe
    choices: Choices
    rows: list[int]
    examples: list[Example]
    shards: list[slice]
    sample: list[Example]
    targets: Tensor

    @property
    def tokens(self) -> int:
        """Completion tokens of this part."""
        return sum(len(example.completion_ids) for example in self.examples)

    @property
    def bytes(self) -> int:
        """Size of the store, as far as it is known before the model runs."""
        width = self.recipe.model.hidden_size * self.choices.hidden_dtype.itemsize
        return round((width + SMALL_BYTES) * self.tokens * (self.recipe.keep_top or 1))

    def texts(self, shard: int) -> ShardTexts:
        """What the shard of this number is made of."""
        return ShardTexts(self.rows[self.shards[shard]], self.examples[self.shards[shard]])

    def tokens_through(self, shard: int) -> int:
        """Prompt and completion tokens of a shard, all of which go through the model."""
        return sum(len(example) for example in self.examples[self.shards[shard]])


def make_plan(corpus: Corpus, source: str, facts: ModelFacts, choices: Choices) -> Plan:
    """Cuts one part of the corpus into shards; `source` names the corpus to a reader.

    Raises UserError where the part has no examples, or a token id lies outside the vocabulary.
    """
    _check_ids(corpus, facts)
    number, parts = choices.part
    examples = corpus.examples[number - 1 :: parts]
    if not examples:
        raise UserError(f"part {number} of {parts} of {source} is empty: it has {len(corpus.examples)} examples in all")
    asked = _without(corpus, choices.held_out)
    return Plan(
        _recipe(corpus, source, facts, choices),
        choices,
        corpus.rows[number - 1 :: parts],
        examples,
        _cut(examples, choices.shard_tokens),
        [asked[index] for index in evenly_spaced([len(example.completion_ids) for example in asked])],
        torch.cat([torch.tensor(example.completion_ids) for example in asked]),
    )


def _without(corpus: Corpus, held_out: Sequence[int]) -> list[Example]:
    excluded = set(held_out)
    return [example for row, example in zip(corpus.rows, corpus.examples, strict=True) if row not in excluded]


def _recipe(corpus: Corpus, source: str, facts: ModelFacts, choices: Choices) -> Recipe:
    support = choices.support
    return Recipe(
        model=facts,
        source=source,
        corpus=corpus_hash(corpus),
        examples=len(corpus.examples),
        part=choices.part,
        hidden_dtype=str(choices.hidden_dtype).removeprefix("torch."),
        support=f"auto:{support}" if isinstance(support, int) else ids_hash(support),
        held_out=ids_hash(choices.held_out) if choices.calibrates and choices.held_out else None,
        keep_top=choices.keep_top,
        shard_tokens=choices.shard_tokens,
        batch_size=choices.batch_size,
    )


Maker = Callable[[Plan, StoreFolder], None]
"""Makes the shards that are missing in a folder that is begun, and lists them."""


def extract(model: nn.Module, head: Head, plan: Plan, folder: Path, by: Maker | None = None) -> Manifest:
    """Makes the store that the plan describes, or continues it; returns its manifest.

    The shards are made by the model in this process where nothing else does (`by`). Raises UserError
    where the folder holds another store or other files, where the disk is too small, and where it
    becomes full: whole shards then stay. An interrupt becomes Interrupted, with the same said.
    """
    store = StoreFolder.begun(folder, plan.recipe)
    store.check_disk(plan.bytes)
    try:
        if store.manifest is None:
            store.begin(_new_manifest(model, head, plan))
        if by is None:
            _add_missing(model, head, plan, store)
        elif store.missing():
            by(plan, store)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(store.so_far()) from interrupt
    return store.finish()


def _add_missing(model: nn.Module, head: Head, plan: Plan, store: StoreFolder) -> None:
    todo = store.missing()
    tokens = sum(plan.tokens_through(number) for number in todo)
    support_M = torch.tensor(store.begun_manifest.support_ids(), device=head.device)
    split = split_vocabulary(support_M, head.vocab_size)
    with meter("hidden states", tokens, "tokens") as bar:
        pace = _Pace(bar, tokens)
        for number in todo:
            store.add(number, shard_columns(model, head, plan.texts(number), split, plan.choices, pace.batch))


class _Pace:
    """Moves the bar, and says the time expected once a few batches have been seen."""

    def __init__(self, bar: Meter, tokens: int) -> None:
        self.bar, self.tokens = bar, tokens
        self.start, self.batches, self.done = time.monotonic(), 0, 0

    def batch(self, tokens: int) -> None:
        """One more batch of this many prompt and completion tokens is done."""
        self.bar.advance(tokens)
        self.batches, self.done = self.batches + 1, self.done + tokens
        if self.batches == ESTIMATE_BATCHES and self.done < self.tokens:
            rate = self.done / (time.monotonic() - self.start)
            more = in_time((self.tokens - self.done) / rate)
            self.bar.say(f"{rate:,.0f} tokens/s, prompts counted: about {more} more are expected")


def _new_manifest(model: nn.Module, head: Head, plan: Plan) -> Manifest:
    """Calibrates, where anything is to be chosen."""
    support, rho = plan.choices.support, plan.choices.keep_top
    threshold = None
    if plan.choices.calibrates:
        hidden_TD = _sample_hidden(model, plan)
        if rho is not None:
            threshold = float(f"{fork_threshold(base_entropies(head, hidden_TD), rho):.4g}")
        if isinstance(support, int):
            support = support_for(measure_fork_mass(head, hidden_TD), plan.targets, support, plan.choices.always)
    return Manifest(
        recipe=plan.recipe,
        support=None if support == list(range(head.vocab_size)) else support,
        threshold=threshold,
        num_shards=len(plan.shards),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of the packages that decide what the model computes."""
    return {name: version(name) for name in ("moe-bias", "torch", "transformers")}


def _sample_hidden(model: nn.Module, plan: Plan) -> Tensor:
    """Hidden states (T, D) of the calibration sample, rounded as they would be stored."""
    parts = []
    with meter("calibration", sum(len(example) for example in plan.sample), "tokens") as bar:
        for batch in longest_first(plan.sample, plan.choices.batch_size):
            examples = [plan.sample[index] for index in batch]
            parts += [
                hidden_TD.to("cpu", plan.choices.hidden_dtype) for hidden_TD in completion_hidden(model, examples)
            ]
            bar.advance(sum(len(example) for example in examples))
    return torch.cat(parts)


def shard_columns(
    model: nn.Module,
    head: Head,
    texts: ShardTexts,
    split: VocabularySplit,
    choices: Choices,
    done: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """All columns of one shard, with every token of its examples; `done` is told of each batch's tokens."""
    examples = texts.examples
    lengths = torch.tensor([len(example.completion_ids) for example in examples])
    token_T = torch.cat([torch.tensor(example.completion_ids) for example in examples])
    columns = _empty_columns(len(token_T), head.hidden_size, choices.hidden_dtype)
    places = torch.arange(len(token_T)).split(lengths.tolist())
    for batch in longest_first(examples, choices.batch_size):
        rows_T = torch.cat([places[index] for index in batch])
        batch_examples = [examples[index] for index in batch]
        for name, values in _batch_columns(model, head, batch_examples, token_T[rows_T], split, choices).items():
            columns[name][rows_T] = values
        done(sum(len(example) for example in batch_examples))
    example_T = torch.tensor(texts.rows).repeat_interleave(lengths)
    return columns | {"token": token_T, "example": example_T, "position": place_in_example(example_T)}


def _batch_columns(
    model: nn.Module,
    head: Head,
    examples: Sequence[Example],
    token_T: Tensor,
    split: VocabularySplit,
    choices: Choices,
) -> dict[str, Tensor]:
    """What one pass through the model gives, the examples' completion tokens in their order."""
    hidden_TD = torch.cat([hidden_TD.to(choices.hidden_dtype) for hidden_TD in completion_hidden(model, examples)])
    scalars = token_scalars(head, hidden_TD.to(head.device), token_T.to(head.device), split)
    return {
        "hidden": hidden_TD.cpu(),
        "logit": scalars.logit,
        "entropy": scalars.base.entropy,
        "log_partition": scalars.base.log_partition,
        "rest_log_sum_exp": scalars.base.rest.log_sum_exp,
        "rest_mean_logit": scalars.base.rest.mean_logit,
    }


def _empty_columns(tokens: int, hidden_size: int, hidden_dtype: torch.dtype) -> dict[str, Tensor]:
    single = {name: torch.empty(tokens) for name in ("logit", "entropy")}
    double = ("log_partition", "rest_log_sum_exp", "rest_mean_logit")
    return (
        {"hidden": torch.empty(tokens, hidden_size, dtype=hidden_dtype)}
        | single
        | {name: torch.empty(tokens, dtype=torch.float64) for name in double}
    )


def _cut(examples: Sequence[Example], shard_tokens: int) -> list[slice]:
    """Runs of consecutive examples, each closed by the example that brings it to `shard_tokens`."""
    shards, start, tokens = [], 0, 0
    for end, example in enumerate(examples, 1):
        tokens += len(example.completion_ids)
        if tokens >= shard_tokens or end == len(examples):
            shards.append(slice(start, end))
            start, tokens = end, 0
    return shards


def _check_ids(corpus: Corpus, facts: ModelFacts) -> None:
    """A tokenizer of another model may give ids that this one has no row for."""
    largest = max((max(example.prompt_ids + example.completion_ids) for example in corpus.examples), default=0)
    if largest >= facts.vocab_size:
        raise UserError(
            f"the tokenizer gave token id {largest}, the model {facts.name!r} has a vocabulary of {facts.vocab_size}; "
            "name the model that the tokenizer belongs to"
        )
