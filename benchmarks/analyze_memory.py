"""Memory of analysing a store, by its number of tokens: parts are streamed, so that it should hardly grow.

    python benchmarks/analyze_memory.py --tokens 500000 2500000 10000000

Each store is generated: random hidden states of a small random output embedding, their true scalars on a
support, examples of 128 tokens, 32,768 tokens a shard. Each is analysed in a process of its own, as
`moe-bias analyze` does it: base entropies and threshold, the survey of one layer, overlap. Peak memory is
the process's, the pages of mapped shards among it, and what it is above the memory held before.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from memory import peak_in_own_process, print_peak
from moe_bias.analysis.summary import by_stratum, overlap_share
from moe_bias.analysis.survey import Text, mark, overlap, survey
from moe_bias.backbone import Head, HeadTransform
from moe_bias.config import LayerConfig
from moe_bias.features.build import SHARD_TOKENS, versions
from moe_bias.features.extract import token_scalars
from moe_bias.features.fingerprint import ModelFacts
from moe_bias.features.manifest import Manifest, Recipe, ids_hash
from moe_bias.features.store import FeatureStore
from moe_bias.features.writer import StoreFolder
from moe_bias.progress import meter
from moe_bias.support import split_vocabulary
from random_layer import random_layer
from side_by_side import write_record

TOKENS = (500_000, 2_500_000, 10_000_000)
HIDDEN, VOCABULARY, SUPPORT = 16, 128, 16
EXAMPLE_TOKENS = 128


def main() -> None:
    """Measures every size and keeps the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="sizes of the stores")
    parser.add_argument("--store", type=Path, help="analyse this store alone and print its peak")
    options = parser.parse_args()
    if options.store is not None:
        print_peak(lambda: analyse(options.store))
        return
    cells = []
    for tokens in options.tokens:
        with tempfile.TemporaryDirectory() as folder:
            make_store(Path(folder) / "store", tokens)
            peak = peak_in_own_process(__file__, {"store": Path(folder) / "store"})
        cells.append({"tokens": tokens, "peak_mib": vars(peak)})
        print(f"{tokens:>12,} tokens: {peak.whole:,.0f} MiB, {peak.above:,.0f} MiB above what was held before")
    sizes = {"hidden": HIDDEN, "vocabulary": VOCABULARY, "support": SUPPORT, "shard_tokens": SHARD_TOKENS}
    write_record("analyze_memory", {"sizes": sizes, "cells": cells})


def analyse(folder: Path) -> None:
    """What the command does for one adapter."""
    head, text = random_head(), Text(FeatureStore.open(folder))
    layer = random_layer(head, LayerConfig(support=tuple(range(SUPPORT))), 1.0)
    marks = mark(text, torch.zeros(VOCABULARY, dtype=torch.int64))
    found = survey(layer, head, text, marks, 20, 5, "analysis")
    by_stratum(found.tally)
    overlap_share(overlap(text, marks, found.adapted_entropy))


def random_head() -> Head:
    """Always the same one."""
    torch.manual_seed(0)
    return Head(nn.Linear(HIDDEN, VOCABULARY, bias=False), HeadTransform())


@torch.no_grad()
def make_store(folder: Path, tokens: int) -> None:
    """A complete store of this many tokens."""
    head = random_head()
    shards = -(-tokens // SHARD_TOKENS)
    support = list(range(SUPPORT))
    store = StoreFolder.begun(folder, _recipe(tokens))
    store.begin(
        Manifest(recipe=_recipe(tokens), support=support, threshold=None, num_shards=shards, versions=versions())
    )
    split = split_vocabulary(torch.tensor(support), VOCABULARY)
    with meter("store", shards, "shards") as bar:
        for number in range(shards):
            place_T = torch.arange(number * SHARD_TOKENS, min((number + 1) * SHARD_TOKENS, tokens))
            hidden_TD = 8 * torch.randn(len(place_T), HIDDEN)
            token_T = torch.randint(VOCABULARY, (len(place_T),))
            scalars = token_scalars(head, hidden_TD, token_T, split)
            columns = {
                "hidden": hidden_TD,
                "token": token_T,
                "example": place_T // EXAMPLE_TOKENS,
                "position": place_T % EXAMPLE_TOKENS,
                "logit": scalars.logit,
                "entropy": scalars.base.entropy,
                "log_partition": scalars.base.log_partition,
                "rest_log_sum_exp": scalars.base.rest.log_sum_exp,
                "rest_mean_logit": scalars.base.rest.mean_logit,
            }
            store.add(number, columns)
            bar.advance(1)
    store.finish()


def _recipe(tokens: int) -> Recipe:
    facts = ModelFacts(
        name="random",
        revision=None,
        backbone="none",
        head="random",
        head_scale=1.0,
        head_cap=None,
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        tokenizer="none",
        compute_dtype="float32",
    )
    return Recipe(
        model=facts,
        source="random",
        corpus="random",
        examples=-(-tokens // EXAMPLE_TOKENS),
        part=(1, 1),
        hidden_dtype="float32",
        support=ids_hash(list(range(SUPPORT))),
        keep_top=None,
        shard_tokens=SHARD_TOKENS,
        batch_size=1,
    )


if __name__ == "__main__":
    main()
