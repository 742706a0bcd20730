"""Making small feature stores in tests."""

import os
import signal
from pathlib import Path

import torch

from helpers.models import VOCABULARY, tiny_model
from moe_bias.backbone import find_head
from moe_bias.features.build import Choices, Plan, extract, make_plan
from moe_bias.features.checked import CHECKED
from moe_bias.features.fingerprint import ModelFacts
from moe_bias.features.manifest import SECONDS, Manifest
from moe_bias.tasks.conversations import Corpus, Example

SUPPORT = [2, 8, 11, 40]
FACTS = ModelFacts(
    name="tiny",
    revision=None,
    backbone="b",
    head="h",
    head_scale=1.0,
    head_cap=None,
    hidden_size=16,
    vocab_size=VOCABULARY,
    tokenizer="t",
    compute_dtype="float32",
)


def corpus_of(count: int = 12, seed: int = 0) -> Corpus:
    """Random examples of 2 to 12 tokens; every third row of the source gave none."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    lengths = torch.randint(1, 7, (count, 2), generator=generator).tolist()
    rows = [row for row in range(2 * count) if row % 3][:count]
    return Corpus([Example(ids(prompt), ids(completion)) for prompt, completion in lengths], rows, 0)


def plan_of(corpus: Corpus | None = None, facts: ModelFacts = FACTS, **choices) -> Plan:
    """A plan with small shards on the given support."""
    return make_plan(
        corpus or corpus_of(), "rows.jsonl", facts, Choices(**{"support": SUPPORT, "shard_tokens": 9, **choices})
    )


def make_store(folder: Path, corpus: Corpus | None = None, name: str = "llama", **choices) -> Manifest:
    """A store of the tiny model."""
    model = tiny_model(name)
    return extract(model, find_head(model)[1], plan_of(corpus, **choices), folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, apart from what says how long it took and what was found whole."""
    names = {path.name for path in folder.iterdir()} - {SECONDS, CHECKED}
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def die() -> None:
    """Kills this process, as a system out of memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step, *functions) -> None:
    """Lets this process kill itself before its `step`-th call of these functions, each by its owner and name."""
    left = step

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                die()
            return function(*args, **kwargs)

        return call

    for owner, name in functions:
        setattr(owner, name, mortal(getattr(owner, name)))


def in_child(work) -> int:
    """Runs `work` in a forked process, where it may kill itself; returns the exit status of waitpid."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not in the child
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def assert_same_features(found, expected, atol=1e-5):
    for name in ("hidden", "token", "position", "logit", "entropy", "log_partition", "column", "support"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=atol, msg=name)
    torch.testing.assert_close(found.rest.log_sum_exp, expected.rest.log_sum_exp, rtol=1e-5, atol=atol)
    torch.testing.assert_close(found.rest.mean_logit, expected.rest.mean_logit, rtol=1e-5, atol=atol)
