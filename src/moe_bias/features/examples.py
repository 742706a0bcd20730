"""The examples of a run: encoded within a length limit, and split in two."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moe_bias.mistakes import UserError
from moe_bias.progress import say
from moe_bias.tasks.conversations import Conversation, Corpus, encode_all

HELD_OUT_AT_LEAST = 2
"""One example has no spread to take an interval from."""


def length_limit(model: Any, max_length: int) -> int:
    """Tokens that an example may have: as many as were asked for and as the model's positions allow."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max_length if context is None else min(max_length, context)


def encoded(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    source: str,
    console: Console,
) -> Corpus:
    """The corpus; says how many examples have no room for an answer, which are cut, and what else it lacks."""
    corpus = encode_all(conversations, tokenizer, limit)
    noun = "rows" if len({conversation.row for conversation in conversations}) == len(conversations) else "answers"
    if corpus.left_out:
        say(console, f"{corpus.left_out} of {len(conversations)} {noun} are left out: no answer fits in {limit} tokens")
    if corpus.cut:
        say(console, f"{corpus.cut} of {len(corpus.examples)} answers are cut: with their prompts they exceed {limit}")
    if not corpus.examples:
        raise UserError(
            f"{source} has no usable row: each prompt fills the limit of {limit} tokens; raise `max_length`"
        )
    if corpus.unreasoned:
        say(
            console,
            f"The reasoning of {corpus.unreasoned} of {len(conversations)} {noun} is left out where the chat template "
            f"of {tokenizer.name_or_path} has no place for it",
        )
    if len(corpus.examples) > 1 and all(example == corpus.examples[0] for example in corpus.examples):
        say(console, f"{source} has one distinct example, {len(corpus.examples)} times")
    return corpus


def split(rows: Sequence[int], held_out: float, seed: int, source: str, noun: str = "usable examples") -> list[int]:
    """The held-out ones among the rows, ascending, drawn with the seed: at least `HELD_OUT_AT_LEAST`, never all.

    Raises UserError where too few rows are there, naming their source and what they are.
    """
    if len(rows) <= HELD_OUT_AT_LEAST:
        raise UserError(
            f"{source} has {len(rows)} {noun}; at least {HELD_OUT_AT_LEAST + 1} are needed, one to train on "
            f"and {HELD_OUT_AT_LEAST} to measure on"
        )
    held = min(max(round(held_out * len(rows)), HELD_OUT_AT_LEAST), len(rows) - 1)
    return sorted(random.Random(seed).sample(rows, len(rows))[:held])
