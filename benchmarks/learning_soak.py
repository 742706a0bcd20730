"""Very many lessons, by simulation: does memory stay flat, do journals stay short, is an adapter still its journal's?

What a server holds (`Learning`) and its process that learns, with a tiny model in the place of a real one: a lesson's
cost is that of Python and of the disk. The process is killed at random, with lessons on their way. Every lesson must
have one outcome, numbered on. At the end each adapter is made again twice and must have the same bytes: all of them
from a copy of their journals without a checkpoint, and some by a learner that was told everything from the first
lesson on, and was never killed, put away or cut.

    python benchmarks/learning_soak.py --lessons 1000000 --minutes 80 --output records/learning/soak.json
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from array import array
from collections import Counter
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe_bias.adapter import save_layer
from moe_bias.adapter.saved import WEIGHTS_FILE
from moe_bias.backbone import Head, find_head
from moe_bias.config import LayerConfig, LearnConfig
from moe_bias.features.extract import Features, answer_features
from moe_bias.learning.journal import Entry
from moe_bias.learning.learner import FREEZE, LESSON, UNDO, UNFREEZE, Learner
from moe_bias.learning.lessons import Lesson, pair_lesson, reward_lesson
from moe_bias.learning.process import CHECKPOINT, JOURNAL, START, Learners, Place
from moe_bias.learning.published import Published
from moe_bias.learning.service import Learning, Told
from moe_bias.progress import meter
from moe_bias.records import provenance, write_json
from moe_bias.serving.versions import read_version

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY, SUPPORT = 512, tuple(range(3, 64))
POOL = 64
"""Different lessons of a tenant, which come again in another order."""
WINDOW = 256
"""Lessons on their way at most: about a dozen of a tenant are read at once."""
MEMORY = 2**20
"""So little that learners are put away and loaded again all the time."""
EVENTS = (UNDO, FREEZE, UNFREEZE)
KILL_EVERY = 50_000
"""Lessons, at random and so many in the mean."""


def config(journal_size: int) -> LearnConfig:
    """As a server has it, but for what costs time in proportion to it."""
    return LearnConfig(
        expert_rate=0.1, passes=1, replay=1, kept_lessons=8, held_out_lessons=2, undo_depth=4, journal_size=journal_size
    )


def features(head: Head, tokens: list[int], generator: torch.Generator) -> Features:
    """Of an answer of these tokens, from random hidden states."""
    hidden_TD = torch.randn(len(tokens), head.hidden_size, generator=generator)
    return answer_features(head, hidden_TD, torch.tensor(tokens), torch.tensor(SUPPORT))


def lesson(head: Head, rng: random.Random, wanted: int, generator: torch.Generator) -> Lesson:
    """A correction to the tenant's own token, or a reward of it; now and then with a token beyond the support."""
    given = [rng.randrange(3, SUPPORT[-1]) for _ in range(rng.randrange(2, 8))]
    if rng.random() < 0.3:
        return reward_lesson(features(head, given, generator), 1.0 if wanted in given else -0.2, 512)
    unknown = [rng.randrange(SUPPORT[-1], VOCABULARY)] if rng.random() < 0.05 else []
    better = [*[wanted] * rng.randrange(1, 6), *unknown, 2]
    return pair_lesson(features(head, better, generator), features(head, [*given, 1], generator), 512)


def resident(pid: int | None) -> int:
    """Bytes of a process; 0 of one that is gone."""
    with suppress(OSError):
        return 4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return 0


class Tenant:
    """An adapter's lessons, and the book of what it was told: places in `lessons`, or below 0 in `EVENTS`."""

    def __init__(self, name: str, lessons: list[Lesson]) -> None:
        self.name, self.lessons = name, lessons
        self.book = array("b")
        self.outcomes = 0

    def told(self, number: int) -> tuple[str, Lesson | None]:
        """The event of an entry, and its lesson."""
        place = self.book[number]
        return (EVENTS[-1 - place], None) if place < 0 else (LESSON, self.lessons[place])

    def made_again(self, start: Path, head: Head, choices: LearnConfig) -> Learner:
        """A learner that hears everything from the first entry on."""
        layer = read_version(start, head.hidden_size, head.vocab_size, head.rows)
        learner = Learner(layer, head, choices)
        for number in range(len(self.book)):
            event, one = self.told(number)
            tensors = {} if one is None else one.tensors()
            learner.apply(Entry(number + 1, event, {"reward": one and one.reward}, tensors, 0))
        return learner


class Soak:
    """Tenants, what learns them, and what was seen of it."""

    def __init__(self, folder: Path, tenants: int, choices: LearnConfig) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SIZES)).eval()
        self.head, self.choices = find_head(model)[1], choices
        self._rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        self._place, given = Place(folder / "learned"), folder / "given"
        self.tenants = [
            Tenant(f"tenant-{number}", [lesson(self.head, self._rng, 5 + number, generator) for _ in range(POOL)])
            for number in range(tenants)
        ]
        fresh = self.head.layer(LayerConfig(num_experts=2, top_k=1, expert_rank=1, support=SUPPORT))
        for tenant in self.tenants:
            save_layer(fresh, given / tenant.name, model)
        self.learning = Learning(self._place.root, given, self.head, choices, memory=MEMORY)
        self._room, self._waiting = BoundedSemaphore(WINDOW), set[Told]()
        self.counts: Counter[str] = Counter()
        self.seen: list[dict[str, int]] = []

    def tell(self) -> None:
        """Tells a tenant drawn at random something; waits while too many lessons are on their way."""
        tenant = self._rng.choice(self.tenants)
        is_event = self._rng.random() < 0.01
        place = -1 - self._rng.randrange(len(EVENTS)) if is_event else self._rng.randrange(POOL)
        tenant.book.append(place)
        event, one = tenant.told(len(tenant.book) - 1)
        self._room.acquire()
        learning = self.learning
        told = learning.tell(tenant.name, event) if one is None else learning.teach(tenant.name, one)
        self._waiting.add(told)
        told.add_done_callback(lambda done: self._done(tenant, done))
        if self._rng.random() < 1 / KILL_EVERY and self.learning.process is not None:
            os.kill(self.learning.process, signal.SIGKILL)
            self.counts["killed"] += 1

    def _done(self, tenant: Tenant, told: Told) -> None:
        outcome = told.result()
        tenant.outcomes += 1
        assert outcome["number"] == tenant.outcomes, f"{tenant.name}: {outcome['number']} after {tenant.outcomes - 1}"
        self.counts.update(key for key in ("applied", "published") if outcome[key])
        self._waiting.discard(told)
        self._room.release()

    def look(self, lessons: int) -> None:
        """Notes what there is now."""
        sizes = [path.stat().st_size for path in self._place.root.glob(f"journals/*/{JOURNAL}")]
        own, other = resident(os.getpid()), resident(self.learning.process)
        self.seen.append(
            {"lessons": lessons, "server": own, "learner": other, "largest_journal": max(sizes, default=0)}
        )

    def finish(self) -> None:
        """Waits for all outcomes, and ends the process."""
        wait(list(self._waiting), timeout=600)
        told = sum(len(tenant.book) for tenant in self.tenants)
        assert sum(tenant.outcomes for tenant in self.tenants) == told, "a lesson has no outcome"
        self.learning.close()

    def from_journals(self) -> int:
        """How many adapters a copy of their journals, without checkpoints, gives the same bytes of."""
        other = Place(self._place.root.with_name("again"))
        shutil.copytree(self._place.root / "journals", other.root / "journals", symlinks=True)
        shutil.copy(self._place.head, other.head)
        for path in other.root.glob(f"journals/*/{CHECKPOINT}"):
            path.unlink()
        learners = Learners(other, self.head.transform, self.choices, MEMORY)
        for tenant in self.tenants:
            learners.read_on(tenant.name)
        return sum(self._weights(self._place, tenant) == self._weights(other, tenant) for tenant in self.tenants)

    def from_the_first(self, count: int) -> int:
        """How many of the first `count` adapters a learner has the same bytes of that heard everything at once."""
        place, same = Place(self._place.root.with_name("plain")), 0
        shutil.rmtree(place.root, ignore_errors=True)
        for tenant in self.tenants[:count]:
            start = self._place.of(tenant.name) / START
            learner = tenant.made_again(start, self.head, self.choices)
            Published(place.root).publish(tenant.name, learner.version, start, learner.layer)
            same += self._weights(self._place, tenant) == self._weights(place, tenant)
        return same

    def _weights(self, place: Place, tenant: Tenant) -> bytes:
        return (place.root / "adapters" / tenant.name / WEIGHTS_FILE).read_bytes()


def main() -> None:
    """Simulates, checks, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lessons", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=80, help="end after them, with however many lessons")
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--told-again", type=int, default=1, help="adapters that a learner is told from the first on")
    parser.add_argument("--journal-size", type=int, default=2**20)
    parser.add_argument("--folder", type=Path, help="where files are kept meanwhile; in memory, syncing costs nothing")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        soak = Soak(Path(folder), args.tenants, config(args.journal_size))
        started, told, every = time.perf_counter(), 0, max(args.lessons // 200, 1)
        with meter("lessons", args.lessons, "lessons") as bar:
            while told < args.lessons and time.perf_counter() - started < 60 * args.minutes:
                soak.tell()
                told += 1
                bar.advance(1)
                if told % every == 0:
                    soak.look(told)
        soak.finish()
        seconds = time.perf_counter() - started
        from_journals, from_the_first = soak.from_journals(), soak.from_the_first(args.told_again)
    record: dict[str, Any] = {
        "kind": "learning soak",
        **provenance(),
        "choices": {name: value for name, value in vars(args).items() if name not in ("output", "folder")},
        "lessons": told,
        "seconds": seconds,
        "counts": dict(soak.counts),
        "seen": soak.seen,
        "same_bytes": {"from journals": from_journals, "from the first": from_the_first},
    }
    print({key: record[key] for key in ("lessons", "seconds", "counts", "same_bytes")}, soak.seen[-1])
    write_json(args.output, record)


if __name__ == "__main__":
    main()
