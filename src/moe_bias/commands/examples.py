"""The frozen model and the examples of a supervised command: read, encoded, and split in two."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_bias.backbone import Head, find_head, load_model
from moe_bias.config import DataSettings, ModelSettings, TrainingSettings, UserError
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.manifest import TEMPERATURE
from moe_bias.features.store import FeatureStore
from moe_bias.tasks.conversations import Conversation, Example, encode_all, ends, read_conversations
from moe_bias.training.sft import parse_support

Item = TypeVar("Item")
HELD_OUT_AT_LEAST = 2
"""One example has no spread to take an interval from."""


@dataclass(frozen=True)
class Material:
    """The frozen model, its output embedding, both parts of the examples, and ids that the support must hold."""

    model: PreTrainedModel
    head: Head
    train: list[Example]
    held_out: list[Example]
    always: list[int]


def load_material(
    settings: ModelSettings, training: TrainingSettings, data: DataSettings, console: Console
) -> Material:
    """Reads the data, loads the model, and splits the examples.

    Raises UserError on data or settings that cannot be used, before the model is loaded where the
    data alone tells.
    """
    conversations = read_conversations(data.data, data.split)
    model, tokenizer = load_model(settings)
    head = find_head(model)[1]
    parse_support(training.support, head.vocab_size)
    train, held_out = split(encoded(conversations, tokenizer, data, console), data.held_out, training.seed)
    return Material(model, head, train, held_out, ends(conversations[0], tokenizer))


@dataclass(frozen=True)
class StoredMaterial:
    """The frozen model, its output embedding, a feature store that fits them, and its held-out examples' rows."""

    model: PreTrainedModel
    head: Head
    store: FeatureStore
    held_out: list[int]


def load_stored(
    settings: ModelSettings, folders: Sequence[str], held_out: float, seed: int, console: Console
) -> StoredMaterial:
    """Opens the store, splits its examples, loads the model, and checks that the store was made with it.

    Raises UserError on folders that are no store, too few examples, and another model's store. Says so
    where the store holds a part of its examples' tokens alone.
    """
    store = FeatureStore.open(*folders)
    rows = store.example.unique().tolist()
    if len(rows) <= HELD_OUT_AT_LEAST:
        raise UserError(
            f"the feature store in {', '.join(folders)} has tokens of {len(rows)} examples; {_enough()}; extract more"
        )
    model, tokenizer = load_model(settings)
    head = find_head(model)[1]
    store.check(model_facts(model, head, tokenizer), temperature=TEMPERATURE)
    if store.dropped:
        console.print(
            f"The store left out {store.dropped:,} tokens of base entropy below {store.manifest.threshold} nats: "
            "training and held-out figures are of the others"
        )
    return StoredMaterial(model, head, store, split(rows, held_out, seed)[1])


def encoded(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, data: DataSettings, console: Console
) -> list[Example]:
    """Examples that have a completion within the length limit; says how many have none."""
    corpus = encode_all(conversations, tokenizer, data.max_length)
    examples = corpus.examples
    if corpus.left_out:
        console.print(
            f"{corpus.left_out} of {len(conversations)} prompts alone fill --max-length {data.max_length}; "
            "they are left out"
        )
    if len(examples) <= HELD_OUT_AT_LEAST:
        raise UserError(f"{data.data} has {len(examples)} usable examples of {len(conversations)}; {_enough()}")
    return examples


def _enough() -> str:
    return f"at least {HELD_OUT_AT_LEAST + 1} are needed, one to train on and {HELD_OUT_AT_LEAST} to measure on"


def split(examples: Sequence[Item], held_out: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Training and held-out examples, drawn with the seed; at least one and `HELD_OUT_AT_LEAST` of them."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    held = min(max(round(held_out * len(examples)), HELD_OUT_AT_LEAST), len(examples) - 1)
    return [examples[index] for index in sorted(order[held:])], [examples[index] for index in sorted(order[:held])]
