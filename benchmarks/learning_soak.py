"""Very many lessons, by simulation: does memory stay flat, do journals stay short, is an adapter still its journal's?

A tiny model stands in for a real one: a lesson's cost there is that of Python and of the disk. Learners lose all that
they hold in memory at random, as a killed process does. At the end every adapter is made again by a learner that saw
nothing but the files, and must have the same bytes.

    python benchmarks/learning_soak.py --lessons 100000 --output records/learning/soak.json
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe_bias.adapter import save_layer
from moe_bias.adapter.saved import WEIGHTS_FILE
from moe_bias.backbone import Head, find_head
from moe_bias.config import LayerConfig, LearnConfig
from moe_bias.features.extract import Features, answer_features
from moe_bias.learning.journal import Journal
from moe_bias.learning.learner import FREEZE, LESSON, UNDO, UNFREEZE
from moe_bias.learning.lessons import Lesson, pair_lesson, reward_lesson
from moe_bias.learning.process import CHECKPOINT, JOURNAL, START, Learners, Place, write_head
from moe_bias.progress import meter
from moe_bias.records import provenance, write_json

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY, SUPPORT = 97, tuple(range(3, 60))
MEMORY = 2**21
"""So little that learners are put away and loaded again all the time."""


def features(head: Head, tokens: list[int], generator: torch.Generator) -> Features:
    """Of an answer of these tokens, from random hidden states."""
    hidden_TD = torch.randn(len(tokens), head.hidden_size, generator=generator)
    return answer_features(head, hidden_TD, torch.tensor(tokens), torch.tensor(SUPPORT))


def lesson(head: Head, rng: random.Random, wanted: int, generator: torch.Generator) -> Lesson:
    """A correction to the tenant's own token, or a reward of it."""
    given = [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(2, 8))]
    if rng.random() < 0.3:
        return reward_lesson(features(head, given, generator), 1.0 if wanted in given else -0.2, 512)
    better = [wanted] * rng.randrange(1, 6) + [2]
    return pair_lesson(features(head, better, generator), features(head, [*given, 1], generator), 512)


def resident() -> int:
    """Bytes of this process."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


class Simulation:
    """Tenants with journals of their own, and what learns them."""

    def __init__(self, root: Path, tenants: int, journal_size: int) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SIZES)).eval()
        self.head = find_head(model)[1]
        self.config = LearnConfig(expert_rate=0.1, journal_size=journal_size, kept_lessons=16)
        self.place, self.names = Place(root), [f"tenant-{number}" for number in range(tenants)]
        save_layer(self.head.layer(LayerConfig(support=SUPPORT)), root / "fresh", model)
        write_head(self.head, self.place.head)
        for name in self.names:
            self.place.of(name).mkdir(parents=True)
            (self.place.of(name) / START).symlink_to((root / "fresh").resolve(), target_is_directory=True)
        self.journals = {name: Journal(self.place.of(name) / JOURNAL) for name in self.names}
        self.learners = self.begun()
        self.cuts = self.published = 0

    def begun(self) -> Learners:
        """Learners that know nothing but the files."""
        return Learners(self.place, self.head.transform, self.config, MEMORY)

    def tell(self, name: str, event: str, one: Lesson | None = None) -> None:
        """An entry, and what comes of it; a long journal is cut, as a server does it."""
        reward = {} if one is None else {"reward": one.reward}
        self.journals[name].append(event, reward, None if one is None else one.tensors())
        outcomes = self.learners.read_on(name)
        self.published += sum(outcome["published"] for outcome in outcomes)
        if self.journals[name].grown > self.config.journal_size:
            through = self.learners.checkpoint(name)
            assert through == self.journals[name].last
            self.journals[name].begin_anew(self.place.of(name) / CHECKPOINT)
            self.cuts += 1

    def weights(self) -> dict[str, bytes]:
        """The served files, by name."""
        return {name: (self.place.root / "adapters" / name / WEIGHTS_FILE).read_bytes() for name in self.names}


def main() -> None:
    """Simulates, checks, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lessons", type=int, default=100_000)
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--journal-size", type=int, default=2**20)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(Path(folder), args.tenants, args.journal_size)
        started, seen, killed = time.perf_counter(), [], 0
        with meter("lessons", args.lessons, "lessons") as bar:
            for number in range(args.lessons):
                name = rng.choice(simulation.names)
                wanted = 5 + simulation.names.index(name)
                draw = rng.random()
                if draw < 0.01:
                    simulation.tell(name, rng.choice((UNDO, FREEZE, UNFREEZE, UNFREEZE)))
                else:
                    simulation.tell(name, LESSON, lesson(simulation.head, rng, wanted, generator))
                if rng.random() < 0.001:
                    simulation.learners, killed = simulation.begun(), killed + 1
                if number % max(args.lessons // 50, 1) == 0:
                    sizes = [journal.size for journal in simulation.journals.values()]
                    seen.append({"lessons": number, "resident": resident(), "largest_journal": max(sizes)})
                bar.advance(1)
        seconds = time.perf_counter() - started
        served = simulation.weights()
        simulation.learners = simulation.begun()
        for name in simulation.names:
            simulation.learners.read_on(name)
            assert simulation.weights()[name] == served[name], f"{name} is not what its journal makes of it"
    half = seen[len(seen) // 2 :]
    print(
        f"{args.lessons:,} lessons in {seconds:.0f} s, {simulation.published:,} versions, {killed} kills, "
        f"{simulation.cuts} journals cut; {half[0]['resident'] / 2**20:.0f} MiB at half, "
        f"{half[-1]['resident'] / 2**20:.0f} at the end"
    )
    write_json(
        args.output,
        {
            "kind": "learning soak",
            **provenance(),
            "choices": {name: value for name, value in vars(args).items() if name != "output"},
            "seconds": seconds,
            "versions": simulation.published,
            "killed": killed,
            "cut": simulation.cuts,
            "seen": seen,
            "same_bytes": True,
        },
    )


if __name__ == "__main__":
    main()
