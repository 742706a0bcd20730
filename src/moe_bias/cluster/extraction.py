"""Shards of a feature store, made by workers that write them straight into the folder.

What goes to a worker is the token ids of a shard, what comes back its checksum and sizes: hidden states never leave
the machine that computed them, but for the folder. Only the process that began lists shards in the manifest. A shard
is a function of its examples and the settings, so a worker that dies leaves nothing to be undone: the shard is made
again, and a file that it left whole is written over with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_bias.cluster.model import NamedModel, model_of_workers
from moe_bias.cluster.pool import Member, Pending, Worker, opened
from moe_bias.config import Cluster
from moe_bias.features.build import Choices, Plan, ShardTexts, shard_columns
from moe_bias.features.manifest import Shard
from moe_bias.features.writer import StoreFolder, write_shard
from moe_bias.frozen import Frozen
from moe_bias.progress import meter
from moe_bias.support import VocabularySplit, split_vocabulary
from moe_bias.tasks.conversations import Example

_ADVICE = "lower `batch_size` or `max_length`, or give workers more memory"


class ShardWorker(Worker):
    """Makes shards of one store."""

    def __init__(self, model: NamedModel, folder: str, support: list[int], choices: Choices, threshold: float | None):
        self._model, self._folder, self._choices, self._threshold = model, Path(folder), choices, threshold
        self._support = support
        self._base: Frozen
        self._split: VocabularySplit

    def load(self, on_gpu: bool) -> None:
        """Loads the model."""
        self._base = self._model.loaded(on_gpu)
        support_M = torch.tensor(self._support, device=self._base.head.device)
        self._split = split_vocabulary(support_M, self._base.head.vocab_size)

    def make(self, number: int, ids: dict[str, Any]) -> dict[str, Any]:
        """Writes the shard of this number; what the manifest says of it. Raises OSError where the disk is full."""
        columns = shard_columns(self._base.model, self._base.head, _texts(ids), self._split, self._choices)
        return write_shard(self._folder, number, columns, self._threshold).model_dump(mode="json")


@dataclass(frozen=True)
class ShardsByWorkers:
    """Makes a store's missing shards on a cluster: a `features.build.Maker`."""

    cluster: Cluster
    model: NamedModel

    def __call__(self, plan: Plan, store: StoreFolder) -> None:
        """Raises UserError as `pool.opened` does, and where workers die over one shard again and again."""
        todo, manifest = store.missing(), store.begun_manifest
        store.reopen()
        # of all that a plan knows a shard needs these alone, and the rest may be long
        choices = replace(plan.choices, support=[], always=(), held_out=())
        folder = store.folder.absolute()
        given = (self.model, str(folder), manifest.support_ids(), choices, manifest.threshold)
        with opened(self.cluster, ShardWorker, given, self.model.device, folder) as pool:

            def ask(member: Member, number: int) -> Pending:
                return pool.ask(member, "make", number, _ids(plan.texts(number)))

            tokens = sum(plan.tokens_through(number) for number in todo)
            with meter("hidden states", tokens, "tokens") as bar, store.writing("a shard"):
                for number, _, entry in pool.each(todo, ask, lambda number: f"shard {number}", _ADVICE):
                    store.enter(Shard.model_validate(entry))
                    bar.advance(plan.tokens_through(number))


def shards_by(
    cluster: Cluster | None, base: Frozen, name: str = "", device: str = "", trust_remote_code: bool = False
) -> ShardsByWorkers | None:
    """What makes a store's shards; None where this process does. See `named_model`."""
    model = model_of_workers(cluster, base, name, device, trust_remote_code)
    return None if cluster is None or model is None else ShardsByWorkers(cluster, model)


def _ids(texts: ShardTexts) -> dict[str, Any]:
    """Examples as three arrays of int32."""
    both = [(example.prompt_ids, example.completion_ids) for example in texts.examples]
    return {
        "rows": np.array(texts.rows),
        "lengths": np.array([[len(prompt), len(completion)] for prompt, completion in both], np.int32),
        "ids": np.array([token for pair in both for part in pair for token in part], np.int32),
    }


def _texts(ids: dict[str, Any]) -> ShardTexts:
    left, examples = ids["ids"].tolist(), []
    place = 0
    for prompt, completion in ids["lengths"].tolist():
        middle, end = place + prompt, place + prompt + completion
        examples.append(Example(left[place:middle], left[middle:end]))
        place = end
    return ShardTexts(ids["rows"].tolist(), examples)
