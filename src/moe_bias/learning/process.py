"""The process that learns beside a server: one core, low priority, and nothing of the model but its output embedding.

It is told the name of an adapter whose journal has grown, applies what is new, publishes what comes of it, and says
so. It holds nothing that is not in a journal: where it is killed, the next one goes on from the last checkpoint, which
is a journal of one entry, the learner's state.
"""

from __future__ import annotations

import os
import signal
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_bias.backbone import Head, HeadTransform
from moe_bias.config import LearnConfig
from moe_bias.learning.journal import beginning, entries, write_state
from moe_bias.learning.learner import Learner
from moe_bias.learning.published import Published
from moe_bias.records import unfinished
from moe_bias.serving.versions import read_version

JOURNAL, CHECKPOINT, START = "journal.bin", "state.bin", "start"
_CHECKPOINT_EVERY = 32
"""Entries: so many are applied again at most after the process was killed."""


@dataclass(frozen=True)
class Place:
    """Where everything about learning is kept: `journals/NAME`, the output embedding, and what is published."""

    root: Path

    def of(self, name: str) -> Path:
        """The folder of an adapter: its journal, its checkpoint, and a link to the adapter that it began as."""
        return self.root / "journals" / name

    @property
    def head(self) -> Path:
        """The output embedding's file."""
        return self.root / "head.safetensors"


def write_head(head: Head, path: Path) -> None:
    """Keeps the output embedding's weight, and its own bias where it has one, in the type that it computes in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as beside:
        save_file(_weights(head), beside)
        beside.replace(path)


def read_head(path: Path, transform: HeadTransform) -> Head:
    """The output embedding that `write_head` kept."""
    return _head_of(load_file(path), transform)


def head_alone(head: Head) -> Head:
    """What `read_head` gives of a head that `write_head` kept, without a file."""
    return _head_of(_weights(head), head.transform)


def _weights(head: Head) -> dict[str, Tensor]:
    tensors = {"weight": head.rows(None).to("cpu", head.dtype).contiguous()}
    bias = getattr(head.module, "bias", None)
    if bias is not None:
        tensors["bias"] = bias.detach().to("cpu", head.dtype).contiguous()
    return tensors


def _head_of(tensors: dict[str, Tensor], transform: HeadTransform) -> Head:
    weight = tensors["weight"]
    module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, dtype=weight.dtype, device="meta")
    module.load_state_dict(tensors, assign=True)
    return Head(module.requires_grad_(False), transform)


class Learners:
    """Learners by the name of their adapter; those that were not wanted the longest are put away beyond `memory`."""

    def __init__(self, place: Place, transform: HeadTransform, config: LearnConfig, memory: int) -> None:
        self._place, self._config, self._memory = place, config, memory
        self._head = read_head(place.head, transform)
        self._published = Published(place.root)
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._told: set[str] = set()

    def read_on(self, name: str) -> list[dict[str, Any]]:
        """Applies what is new in a journal, and publishes what comes of it; the outcomes, with `milliseconds`.

        The first of an adapter begin with all that its state tells of: a process that was killed may have written that
        down, and told nobody.
        """
        try:
            outcomes = self._read_on(name)
        except BaseException:
            self._loaded.pop(name, None)  # it may be in the middle of an entry
            self._told.discard(name)
            raise
        if name not in self._told:
            self._told.add(name)
            new = len(outcomes)
            told = self._loaded[name].learner.history
            outcomes = [*({**asdict(one), "milliseconds": 0.0} for one in told[: len(told) - new]), *outcomes]
        return outcomes

    def _read_on(self, name: str) -> list[dict[str, Any]]:
        loaded = self._load(name)
        outcomes = []
        journal = self._place.of(name) / JOURNAL
        if (begins := beginning(journal)) != loaded.begins:  # it was cut since
            loaded.begins, loaded.offset = begins, 0
        for entry in entries(journal, loaded.offset, begins):
            started = time.perf_counter()
            outcome = loaded.learner.apply(entry)
            loaded.offset = entry.end
            if outcome is not None:
                outcomes.append({**asdict(outcome), "milliseconds": 1e3 * (time.perf_counter() - started)})
                loaded.since += 1
        if not loaded.is_published or any(outcome["published"] for outcome in outcomes):
            self._publish(name, loaded, outcomes)
        if loaded.since >= _CHECKPOINT_EVERY:
            self._checkpoint(name, loaded)
        loaded.nbytes = loaded.learner.nbytes
        self._put_away(name)
        return outcomes

    def checkpoint(self, name: str) -> int:
        """Writes the state of an adapter; returns the number of the last entry in it."""
        loaded = self._load(name)
        self._checkpoint(name, loaded)
        return loaded.learner.through

    def close(self) -> None:
        """Writes the states that have changed."""
        for name, loaded in self._loaded.items():
            if loaded.since:
                self._checkpoint(name, loaded)

    def _load(self, name: str) -> _Loaded:
        if name not in self._loaded:
            folder = self._place.of(name)
            layer = read_version(folder / START, self._head.hidden_size, self._head.vocab_size, self._head.rows)
            learner = Learner(layer, self._head, self._config)
            if (folder / CHECKPOINT).exists():
                for entry in entries(folder / CHECKPOINT):
                    learner.apply(entry)
            self._loaded[name] = _Loaded(learner)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _publish(self, name: str, loaded: _Loaded, outcomes: list[dict[str, Any]]) -> None:
        """Once all that is new was applied: a server that is started again never goes back to an earlier version."""
        started, learner = time.perf_counter(), loaded.learner
        self._published.publish(name, learner.version, self._place.of(name) / START, learner.layer)
        loaded.is_published = True
        for outcome in outcomes:
            outcome["milliseconds"] += 1e3 * (time.perf_counter() - started)

    def _checkpoint(self, name: str, loaded: _Loaded) -> None:
        write_state(self._place.of(name) / CHECKPOINT, loaded.learner.through, *loaded.learner.state())
        loaded.since = 0

    def _put_away(self, wanted: str) -> None:
        total = sum(loaded.nbytes for loaded in self._loaded.values())
        for name in list(self._loaded):
            if total <= self._memory or name == wanted:
                return
            loaded = self._loaded.pop(name)
            if loaded.since:
                self._checkpoint(name, loaded)
            total -= loaded.nbytes


@dataclass
class _Loaded:
    """A learner, where its journal is to be read on, and how many entries came since its checkpoint.

    `is_published`: what is served is its version. `nbytes` are the learner's, after it was last read on.
    """

    learner: Learner
    nbytes: int = 0
    is_published: bool = False
    begins: bytes = b""
    offset: int = 0
    since: int = 0


def learn(
    place: Place,
    transform: HeadTransform,
    config: LearnConfig,
    memory: int,
    requests: Connection,
    replies: Connection,
) -> None:
    """The process: answers each name with its outcomes, until the other side is gone.

    A request is ("read", name) or ("checkpoint", name), a reply (request, outcomes or number, None) or
    (request, None, a sentence about what failed).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, whose end is seen here
    with suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    learners = Learners(place, transform, config, memory)
    with suppress(EOFError, BrokenPipeError):
        while True:
            kind, name = requests.recv()
            try:
                found: Any = learners.read_on(name) if kind == "read" else learners.checkpoint(name)
            except Exception as error:  # one adapter's damaged file must not end the learning of all others
                replies.send(((kind, name), None, f"{type(error).__name__}: {error}"))
            else:
                replies.send(((kind, name), found, None))
    learners.close()
