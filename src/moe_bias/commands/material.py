"""What a supervised command works on: the frozen model and hidden states that were extracted, before or just now.

Given `--store` the states are there. Given `--data`, or other texts, they are extracted into a store first, which is
kept: in `--features`, or in the user's cache under a name that follows from all that decides its
content. The next run of the same model, data and limits finds it there; an extraction that was cut
short goes on. The support of such a store is chosen on the training examples alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel

from moe_bias.backbone import Head, find_head
from moe_bias.commands.examples import encoded, length_limit, say, split
from moe_bias.commands.making import made
from moe_bias.commands.training_settings import SupervisedSettings, TextSettings
from moe_bias.config import OWN_SUPPORT
from moe_bias.evaluation.statistics import Floats
from moe_bias.features.build import Choices, Plan, make_plan, versions
from moe_bias.features.fingerprint import corpus_hash, model_facts
from moe_bias.features.manifest import TEMPERATURE, recipe_hash
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import cache_folder, load_model
from moe_bias.limits import in_bytes
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.records import temporary_folder
from moe_bias.tasks.columns import read_conversations
from moe_bias.tasks.conversations import Conversation, Corpus, Example, answer_ends, encode_all
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.sft import Prepared, parse_support, prepare_stored, refuse_impossible

NAME_LENGTH = 16
"""Digits of the hash that names a store in the cache."""


@dataclass(frozen=True)
class Texts:
    """Conversations to extract from, what they are called, and the unit that each belongs to.

    A unit is held out whole; `noun` says what units are. Of data each row is one, whatever answers in it count.
    """

    conversations: Sequence[Conversation]
    source: str
    units: Sequence[int]
    noun: str = "usable examples"

    @classmethod
    def of_data(cls, settings: TextSettings) -> Texts:
        """The rows of the settings' data. Raises UserError where they cannot be read."""
        conversations = read_conversations(settings.data, settings.split, settings.train_on)
        return cls(conversations, settings.data, [conversation.row for conversation in conversations])

    def held_out(self, rows: Sequence[int], share: float, seed: int) -> list[int]:
        """The rows, of those that can be used, whose unit is held out. Raises UserError on too few units."""
        units = list(dict.fromkeys(self.units[row] for row in rows))
        held = set(split(units, share, seed, self.source, self.noun))
        return [row for row in rows if self.units[row] in held]


@dataclass(frozen=True)
class Material:
    """The frozen model, its output embedding, a feature store that fits them, and the rows that are held out.

    `always` are ids that a chosen support must hold, `made_on` is the support that the store was asked
    for. `corpus` are the texts, None where there is only the store; `held_out_units` the unit of each row that is
    held out, None where each row is one.
    """

    model: PreTrainedModel
    head: Head
    store: FeatureStore
    held_out: list[int]
    always: list[int]
    made_on: str = OWN_SUPPORT
    corpus: Corpus | None = None
    held_out_units: Sequence[int] | None = None

    def on(self, support: str) -> Prepared:
        """Features on a support, as the option names it. Raises UserError on one that cannot be."""
        wanted = OWN_SUPPORT if support == self.made_on else support
        return prepare_stored(self.store, self.head, self.held_out, wanted, self.always)

    def by_unit(self, sums: Floats) -> Floats:
        """Sums over held-out rows as sums over held-out units: those of one unit are not independent."""
        if self.held_out_units is None:
            return sums
        number = np.unique(self.held_out_units, return_inverse=True)[1]
        return np.bincount(number, weights=sums).astype(np.float64)

    def examples(self) -> tuple[list[Example], list[Example]]:
        """Training and held-out examples."""
        assert self.corpus is not None
        train: list[Example] = []
        held_out: list[Example] = []
        excluded = set(self.held_out)
        for row, example in zip(self.corpus.rows, self.corpus.examples, strict=True):
            (held_out if row in excluded else train).append(example)
        return train, held_out


@contextmanager
def opened(
    settings: SupervisedSettings, console: Console, processes: Processes = ALONE, texts: Texts | None = None
) -> Iterator[Material]:
    """The material while the block runs; features that are not to be kept are removed after it.

    `texts` are what to extract from where the settings name neither data nor a store. Raises UserError on data,
    stores or settings that cannot be used, before the model is loaded where that can be told; Interrupted where an
    extraction was, with what is whole.
    """
    if settings.store:
        yield _stored(settings, settings.store, console, processes)
    else:
        with _extracted(settings, texts or Texts.of_data(settings), console, processes) as material:
            yield material


def _stored(settings: SupervisedSettings, folders: Sequence[str], console: Console, processes: Processes) -> Material:
    """Says so where the store holds a part of its examples' tokens alone."""
    store = _open(folders, processes)
    name = f"the feature store in {', '.join(folders)}"
    held_out = split(store.example.unique().tolist(), settings.held_out, settings.seed, name)
    model, tokenizer = load_model(settings)
    head = find_head(model)[1]
    refuse_impossible(settings, head, len(store))
    store.check(model_facts(model, head, tokenizer), temperature=TEMPERATURE)
    if store.dropped:
        say(
            console,
            f"The store left out {store.dropped:,} tokens of base entropy below {store.manifest.threshold} nats: "
            "training and held-out figures are of the others",
        )
    if settings.data and store.dropped:
        raise UserError("the store left out tokens that LoRA would be trained on; extract again without --keep-top")
    corpus = texts_of(store, settings, model, tokenizer) if settings.data else None
    return Material(model, head, store, held_out, answer_ends(model, tokenizer), corpus=corpus)


def _open(folders: Sequence[str | Path], processes: Processes) -> FeatureStore:
    """The first process compares checksums, before the others find written down that they fit."""
    if not processes.is_first:
        processes.wait()
    store = FeatureStore.open(*folders)
    if processes.is_first:
        processes.wait()
    return store


def texts_of(store: FeatureStore, settings: TextSettings, model: PreTrainedModel, tokenizer: Any) -> Corpus:
    """The examples that a store was extracted from. Raises UserError where the data gives others."""
    conversations = read_conversations(settings.data, settings.split, settings.train_on)
    corpus = encode_all(conversations, tokenizer, length_limit(model, settings.max_length))
    if corpus_hash(corpus) != store.manifest.recipe.corpus:
        raise UserError(f"the store in {', '.join(settings.store or ())} was not extracted from {settings.data}")
    rows = set(store.example.unique().tolist())
    kept = [pair for pair in zip(corpus.rows, corpus.examples, strict=True) if pair[0] in rows]
    return Corpus([example for _, example in kept], [row for row, _ in kept], corpus.left_out)


@contextmanager
def _extracted(
    settings: SupervisedSettings, texts: Texts, console: Console, processes: Processes
) -> Iterator[Material]:
    model, tokenizer = load_model(settings)
    head = find_head(model)[1]
    support = parse_support(settings.support, head.vocab_size)
    limit = length_limit(model, settings.max_length)
    corpus = encoded(texts.conversations, tokenizer, limit, texts.source, console)
    held_out = texts.held_out(corpus.rows, settings.held_out, settings.seed)
    always = answer_ends(model, tokenizer)
    choices = Choices(support, always, head.dtype, batch_size=settings.batch_size, held_out=held_out)
    plan = make_plan(corpus, texts.source, model_facts(model, head, tokenizer), choices)
    refuse_impossible(settings, head, plan.tokens)
    with features_of(model, head, plan, settings, console, processes) as store:
        units = [texts.units[row] for row in held_out]
        yield Material(model, head, store, held_out, always, settings.support, corpus, units)


@contextmanager
def features_of(
    model: PreTrainedModel,
    head: Head,
    plan: Plan,
    settings: TextSettings,
    console: Console,
    processes: Processes = ALONE,
) -> Iterator[FeatureStore]:
    """The store that the plan describes, found or made; one that is not to be kept is removed after the block."""
    with _folder(settings, plan, processes) as folder:
        if processes.is_first:
            _make(model, head, plan, folder, settings, console)
        yield _open([folder], processes)


@contextmanager
def _folder(settings: TextSettings, plan: Plan, processes: Processes) -> Iterator[Path]:
    """Where the features of this plan are; in all processes the same folder, which the first one removes."""
    if settings.keep_features:
        name = recipe_hash(plan.recipe, versions())[:NAME_LENGTH]
        yield settings.features or cache_folder() / "features" / name
    elif processes.is_first:
        with temporary_folder("features") as folder:
            yield Path(processes.of_first(str(folder)))
    else:
        yield Path(processes.of_first(""))


def _make(
    model: PreTrainedModel, head: Head, plan: Plan, folder: Path, settings: TextSettings, console: Console
) -> None:
    try:
        manifest = made(model, head, plan, folder, console)
    except Interrupted as interrupt:
        if settings.keep_features:
            raise
        raise KeyboardInterrupt from interrupt  # what is whole is about to be removed
    if settings.keep_features:
        say(
            console, f"{in_bytes(manifest.bytes)} of hidden states stay there for later runs; the folder can be deleted"
        )
