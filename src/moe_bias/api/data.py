"""What supervised training works on: hidden states of prompts and answers, extracted before or just now.

A feature store holds them already. Rows are extracted into one first, which is kept: in a folder that is named, or in
the user's cache under a name that follows from all that decides its content. The next call with the same model, rows
and limits finds it there; an extraction that was cut short goes on. The support of such a store is chosen on the
training examples alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_bias.api.arguments import named, refuse_other_base
from moe_bias.cluster.extraction import shards_by
from moe_bias.config import OWN_SUPPORT, Cluster, TrainOn
from moe_bias.features.build import Choices, Maker, Plan, make_plan, versions
from moe_bias.features.examples import encoded, length_limit, split
from moe_bias.features.fingerprint import corpus_hash, model_facts
from moe_bias.features.making import made
from moe_bias.features.manifest import MANIFEST, TEMPERATURE, first_difference, other_store, read_manifest, recipe_hash
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import Frozen, cache_folder
from moe_bias.limits import in_bytes
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.progress import say, text_console
from moe_bias.records import temporary_folder
from moe_bias.tasks.columns import conversations_of, read_conversations, rows_in_memory
from moe_bias.tasks.conversations import Conversation, Corpus, answer_ends, encode_all
from moe_bias.tasks.preferences import both_sides, preferences, read_preferences, whole_pairs
from moe_bias.training.data import Data
from moe_bias.training.processes import ALONE, Processes
from moe_bias.training.sft import parse_support

NAME_LENGTH = 16
"""Digits of the hash that names a store in the cache."""

_OF_ANY_READER = frozenset({"support", "held_out", "shard_tokens", "batch_size"})
"""Fields of a recipe that reading asks nothing of: it takes tokens on any support, all of them or those held out."""

Rows = str | Path | Sequence[Any]
"""A JSON Lines file, the name of a data set on the Hub, or rows in memory: dicts, a
`datasets.Dataset`, or a `pandas.DataFrame`."""


@dataclass(frozen=True)
class Texts:
    """Conversations to extract from, what they are called, and the unit that each belongs to.

    A unit is held out whole; `noun` says what units are. Of data each row is one, whatever answers in it count. Of
    `pairs` conversations stand two by two: the chosen answer to a prompt and the rejected one.
    """

    conversations: Sequence[Conversation]
    source: str
    units: Sequence[int]
    noun: str = "usable examples"
    pairs: bool = False

    @classmethod
    def of(cls, rows: Rows, split: str = "train", train_on: TrainOn = "last-turn", pairs: bool = False) -> Texts:
        """Raises UserError, naming row and column, on rows that cannot be read."""
        if pairs:
            return cls._of_pairs(rows, split)
        if isinstance(rows, str | Path):
            conversations, source = read_conversations(str(rows), split, train_on), str(rows)
        else:
            source = "the rows"
            conversations = conversations_of(rows_in_memory(rows, source), source, train_on)
        return cls(conversations, source, [conversation.row for conversation in conversations])

    @classmethod
    def _of_pairs(cls, rows: Rows, split: str) -> Texts:
        """Both answers of each preference; a pair is a unit."""
        if isinstance(rows, str | Path):
            found, source = read_preferences(str(rows), split), str(rows)
        else:
            source = "the rows"
            found = preferences(rows_in_memory(rows, source), source)
        sides = both_sides(found)
        return cls(sides, source, [number // 2 for number in range(len(sides))], "usable pairs", pairs=True)

    def held_out(self, rows: Sequence[int], share: float, seed: int) -> list[int]:
        """The rows, of those that can be used, whose unit is held out. Raises UserError on too few units."""
        units = list(dict.fromkeys(self.units[row] for row in rows))
        held = set(split(units, share, seed, self.source, self.noun))
        return [row for row in rows if self.units[row] in held]


class HasTexts:
    """Base of what has texts of its own to extract from, such as the right answers of an evaluation."""

    texts: Texts


def refuse_other_data(data: object, base: Frozen) -> None:
    """Raises UserError where it is no data, or that of another frozen model."""
    if not isinstance(data, Data):
        raise UserError(f"`data` is {named(data)}; give what moe_bias.extract(base, rows) returns")
    if data.base is not base:
        raise UserError("`data` is of another frozen model than `base`; extract it with this one")


def extract(
    base: Frozen,
    rows: Rows | HasTexts,
    *,
    held_out: float = 0.05,
    support: str | Sequence[int] = "auto:4096",
    seed: int = 0,
    keep: bool | str | Path = True,
    split: str = "train",
    train_on: TrainOn = "last-turn",
    pairs: bool = False,
    max_length: int = 2048,
    batch_size: int = 16,
    cluster: Cluster | None = None,
) -> Data:
    """Hidden states of the answers in the rows, by one pass of the frozen model; or those of a feature store.

    `rows` are dicts (`prompt` and `completion`, `question` and `answer`, `messages`, ...), a JSON Lines file, the name
    of a data set on the Hub (its `split`), a `datasets.Dataset`, a `pandas.DataFrame`, the folder of a store that
    `moe-bias extract` made, or what `right_answers` returns, of which a problem is held out with all its answers.
    `held_out` is the share of the examples, in (0, 1), to measure on, drawn with `seed`. `support` is 'auto:M', 'all',
    a JSON file of token ids, or the ids. `keep`: True keeps the states in the user's cache, where the next call of the
    same model, rows and limits finds them; a path keeps them there; False removes them with what is returned. Of a
    conversation `train_on` takes the 'last-turn' of the assistant or 'all-turns'. With `pairs` the rows are preferences
    (`prompt`, `chosen` and `rejected`), for an objective of pairs such as `DPO`. Examples are cut at `max_length`
    tokens, or at the model's context; `batch_size` go through the model at a time. The workers of a `cluster` make the
    states in this process's place; they load the model by its name.

    Raises UserError on rows, stores and values that cannot be used; Interrupted where the extraction was, with what is
    whole.
    """
    refuse_other_base(base)
    if isinstance(rows, str | Path) and (Path(rows) / MANIFEST).is_file():
        return of_store(base, [str(rows)], held_out, seed)
    if isinstance(rows, HasTexts) and pairs:
        raise UserError("`pairs` needs rows of preferences, and `rows` are right answers without a rejected one")
    texts = rows.texts if isinstance(rows, HasTexts) else Texts.of(rows, split, train_on, pairs)
    return of_texts(base, texts, Extraction(held_out, seed, support, keep, max_length, batch_size, cluster))


@dataclass(frozen=True)
class Extraction:
    """How texts become features; see `extract`."""

    held_out: float
    seed: int
    support: str | Sequence[int]
    keep: bool | str | Path
    max_length: int
    batch_size: int
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.support, Sequence):
            raise UserError(f"support is {named(self.support)}: give 'auto:M', as in 'auto:4096', 'all', or token ids")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}: give the share to measure on, above 0 and below 1")
        for name in ("max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")


def of_store(
    base: Frozen,
    folders: Sequence[str],
    held_out: float,
    seed: int,
    processes: Processes = ALONE,
    console: Console | None = None,
) -> Data:
    """The features in these folders. Says so where the store holds a part of its examples' tokens alone."""
    return fitted(base, opened_store(folders, processes), folders, held_out, seed, console)


def opened_store(folders: Sequence[str | Path], processes: Processes = ALONE) -> FeatureStore:
    """The first process compares checksums, before the others find written down that they fit."""
    if not processes.is_first:
        processes.wait()
    store = FeatureStore.open(*folders)
    if processes.is_first:
        processes.wait()
    return store


def rows_held_out(store: FeatureStore, folders: Sequence[str], held_out: float, seed: int) -> list[int]:
    """The rows of a store to measure on. Raises UserError where it has too few."""
    return split(store.example.unique().tolist(), held_out, seed, f"the feature store in {', '.join(folders)}")


def fitted(
    base: Frozen,
    store: FeatureStore,
    folders: Sequence[str],
    held_out: float,
    seed: int,
    console: Console | None = None,
) -> Data:
    """The features of a store that is open. Raises UserError where they are of another model."""
    held = rows_held_out(store, folders, held_out, seed)
    store.check(model_facts(base.model, base.head, base.tokenizer), temperature=TEMPERATURE)
    if store.dropped:
        say(
            console or text_console(),
            f"The store left out {store.dropped:,} tokens of base entropy below {store.manifest.threshold} nats: "
            "training and held-out figures are of the others",
        )
    return Data(base, store, held, answer_ends(base.model, base.tokenizer))


def texts_of(base: Frozen, store: FeatureStore, texts: Texts, max_length: int) -> Corpus:
    """The examples that a store was extracted from. Raises UserError where the texts give others."""
    corpus = encode_all(texts.conversations, base.tokenizer, length_limit(base.model, max_length))
    if corpus_hash(corpus) != store.manifest.recipe.corpus:
        folders = ", ".join(map(str, store.folders))
        raise UserError(f"the store in {folders} was not extracted from {texts.source}")
    rows = set(store.example.unique().tolist())
    kept = [pair for pair in zip(corpus.rows, corpus.examples, strict=True) if pair[0] in rows]
    return Corpus([example for _, example in kept], [row for row, _ in kept], corpus.left_out)


def of_texts(
    base: Frozen,
    texts: Texts,
    how: Extraction,
    processes: Processes = ALONE,
    console: Console | None = None,
    check: Callable[[int], None] = lambda tokens: None,
) -> Data:
    """The features of texts, found or made; `check` is told of the number of tokens before the model runs."""
    console, head = console or text_console(), base.head
    support = parse_support(how.support, head.vocab_size) if isinstance(how.support, str) else list(how.support)
    corpus = encoded(
        texts.conversations, base.tokenizer, length_limit(base.model, how.max_length), texts.source, console
    )
    if texts.pairs:
        corpus = whole_pairs(corpus)
    held_out = texts.held_out(corpus.rows, how.held_out, how.seed)
    always = answer_ends(base.model, base.tokenizer)
    choices = Choices(support, always, head.dtype, batch_size=how.batch_size, held_out=held_out)
    plan = make_plan(corpus, texts.source, model_facts(base.model, head, base.tokenizer), choices)
    check(plan.tokens)
    with ExitStack() as own:
        store = stored(base, plan, how.keep, own, processes, console, shards_by(how.cluster, base))
        folder = own.pop_all()
    units = [texts.units[row] for row in held_out]
    made_on = how.support if isinstance(how.support, str) else OWN_SUPPORT
    return Data(base, store, held_out, always, made_on, corpus, units, texts.pairs, folder)


def stored(
    base: Frozen,
    plan: Plan,
    keep: bool | str | Path,
    folder: ExitStack,
    processes: Processes,
    console: Console,
    by: Maker | None = None,
) -> FeatureStore:
    """The store that the plan describes, found or made; one that is not to be kept is removed as `folder` is closed."""
    path = _folder_of(plan, keep, folder, processes)
    if processes.is_first:
        _make(base, plan, path, bool(keep), console, by)
    return opened_store([path], processes)


@contextmanager
def features_to_read(base: Frozen, plan: Plan, keep: bool | str | Path, console: Console) -> Iterator[FeatureStore]:
    """The plan's store; or, in the folder `keep`, one of the same texts that was made otherwise, such as by training.

    What is not to be kept is removed after the block. Raises UserError where the folder's is of another model or other
    texts, or lacks tokens.
    """
    with ExitStack() as folder:
        found = None if isinstance(keep, bool) else _made_otherwise(Path(keep), plan, console)
        yield stored(base, plan, keep, folder, ALONE, console) if found is None else found


def _made_otherwise(folder: Path, plan: Plan, console: Console) -> FeatureStore | None:
    """None where there is no store, or the plan's own."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if first_difference(manifest.recipe, plan.recipe) is None:
        return None
    wrong = first_difference(manifest.recipe, plan.recipe, _OF_ANY_READER)
    if wrong is not None:
        raise other_store(folder, manifest, wrong)
    say(console, f"hidden states found in {folder}: the model is not run for them")
    return FeatureStore.open(folder)


def _folder_of(plan: Plan, keep: bool | str | Path, folder: ExitStack, processes: Processes) -> Path:
    """Where the features of this plan are; in all processes the same folder, which the first one removes."""
    if isinstance(keep, str | Path):
        return Path(keep)
    name = recipe_hash(plan.recipe, versions())[:NAME_LENGTH]
    if keep:
        return cache_folder() / "features" / name
    own = str(folder.enter_context(temporary_folder(f"features-{name}"))) if processes.is_first else ""
    return Path(processes.of_first(own))


def _make(base: Frozen, plan: Plan, folder: Path, keep: bool, console: Console, by: Maker | None) -> None:
    try:
        manifest = made(base.model, base.head, plan, folder, console, by)
    except Interrupted as interrupt:
        if keep:
            raise
        raise KeyboardInterrupt from interrupt  # what is whole is about to be removed
    if keep:
        say(
            console, f"{in_bytes(manifest.bytes)} of hidden states stay there for later runs; the folder can be deleted"
        )
