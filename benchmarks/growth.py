"""How an epoch's time grows with the tokens of the corpus and the size of the support, M.

One epoch of each cell, after two batches to warm up. `support` computes base logits anew, `kept` keeps
them where T x M float32 fit into the budget (elsewhere the cell is recorded as not kept), `full` is M = V.
The layer is the one that the package makes where nothing is chosen. The corpus repeats the hidden states of
its first 4,096 tokens; memory and time are those of a corpus without repeats.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from corpus import Corpus, corpus_of, model_of
from moe_bias.config import LayerConfig
from side_by_side import wait, write_record
from update_arms import DEFAULT, full, kept, reduced

TOKENS = (4096, 16384, 65536, 262144)
SUPPORTS = (1024, 4096, 16384, 65536)
"""And the whole vocabulary."""
DISTINCT = 4096


def measure_growth(options: argparse.Namespace) -> None:
    """Prints every cell, and keeps the record."""
    tokens = options.growth or TOKENS
    corpus = corpus_of(model_of(options), min(DISTINCT, max(tokens)))
    budget = int(options.budget * 2**30)
    cells = [
        shown(cell)
        for support in supports_of(corpus.head.vocab_size)
        for count in tokens
        for cell in cells_of(corpus, count, support, budget)
    ]
    sizes = {"hidden": corpus.head.hidden_size, "vocabulary": corpus.head.vocab_size}
    note = f"the corpus repeats the hidden states of {len(corpus.hidden.token):,} tokens"
    layer = LayerConfig(**DEFAULT).model_dump()
    write_record(
        "growth",
        {
            "options": vars(options),
            "sizes": sizes,
            "budget_bytes": budget,
            "hidden_states": note,
            "layer": layer,
            "cells": cells,
        },
    )


def supports_of(vocabulary: int) -> list[int]:
    """Sizes below the vocabulary's, and the vocabulary's."""
    return [*(size for size in SUPPORTS if size < vocabulary), vocabulary]


def cells_of(corpus: Corpus, tokens: int, support: int, budget: int) -> list[dict[str, Any]]:
    """An epoch with base logits computed anew, and one with kept ones; `seconds` is None where they do not fit."""
    whole = support == corpus.head.vocab_size
    size = {"tokens": tokens, "support": support}
    anew = {**size, "arm": "full" if whole else "support", "seconds": seconds(corpus, tokens, support, keep=False)}
    needed = 4 * tokens * support
    fits = needed <= budget
    return [
        anew,
        {
            **size,
            "arm": "kept",
            "kept_bytes": needed,
            "seconds": seconds(corpus, tokens, support, keep=True) if fits else None,
        },
    ]


def seconds(corpus: Corpus, tokens: int, support: int, keep: bool) -> float:
    """One epoch."""
    whole = support == corpus.head.vocab_size
    arm = (kept if keep else full if whole else reduced)(corpus, tokens, support, DEFAULT)
    arm.beginning()()
    wait()
    started = time.perf_counter()
    arm()
    return time.perf_counter() - started


def shown(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell, printed."""
    time_taken = "not kept" if cell["seconds"] is None else f"{cell['seconds']:.3f} s"
    print(f"  {cell['arm']:<8} M = {cell['support']:>7,}  {cell['tokens']:>8,} tokens  {time_taken}", flush=True)
    return cell
