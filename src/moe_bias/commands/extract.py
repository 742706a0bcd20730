"""`moe-bias extract`: the hidden states of a corpus and their scalars, kept on disk for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moe_bias.backbone import Head, find_head, load_model
from moe_bias.config import ExtractSettings, UserError
from moe_bias.features.build import Choices, Plan, extract, make_plan
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.manifest import Manifest, read_manifest
from moe_bias.features.writer import in_bytes
from moe_bias.tasks.conversations import Conversation, Corpus, encode_all, ends, read_conversations
from moe_bias.training.sft import parse_support


def run(settings: ExtractSettings) -> None:
    """Makes or continues the store in `settings.output`, saying before what it will cost and after what it holds.

    Raises UserError on data or settings that cannot be used; Interrupted, with what is whole.
    """
    console = Console(highlight=False, soft_wrap=True)
    conversations = read_conversations(settings.data, settings.split)
    model, tokenizer = load_model(settings.model_copy(update={"dtype": "auto"}))
    head = find_head(model)[1]
    corpus = _encoded(conversations, tokenizer, _length_limit(model, settings), settings.data, console)
    choices = _choices(settings, head, ends(conversations[0], tokenizer))
    plan = make_plan(corpus, settings.data, model_facts(model, head, tokenizer), choices)
    console.print(_cost(plan, settings))
    console.print(_summary(extract(model, head, plan, settings.output), settings.output))


def _length_limit(model: Any, settings: ExtractSettings) -> int:
    """Tokens that an example may have: as many as were asked for and as the model's positions allow."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return settings.max_length if context is None else min(settings.max_length, context)


def _encoded(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    source: str,
    console: Console,
) -> Corpus:
    """The corpus; says how many rows have no room for an answer and how many answers are cut."""
    corpus = encode_all(conversations, tokenizer, limit)
    if corpus.left_out:
        console.print(f"{corpus.left_out} of {len(conversations)} rows are left out: no answer fits in {limit} tokens")
    if corpus.cut:
        console.print(f"{corpus.cut} of {len(corpus.examples)} answers are cut: with their prompts they exceed {limit}")
    if not corpus.examples:
        raise UserError(
            f"{source} has no usable row: each prompt fills the limit of {limit} tokens; raise --max-length"
        )
    return corpus


def _choices(settings: ExtractSettings, head: Head, always: Sequence[int]) -> Choices:
    dtype = head.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return Choices(
        support=_support(settings.support, head),
        always=always,
        hidden_dtype=dtype,
        part=settings.part,
        keep_top=settings.keep_top,
        shard_tokens=settings.shard_tokens,
        batch_size=settings.batch_size,
    )


def _support(text: str, head: Head) -> int | list[int]:
    """A size to choose, or ids. Raises UserError on ids that the model's vocabulary lacks."""
    if not Path(text).is_dir():
        return parse_support(text, head.vocab_size)
    ids = read_manifest(Path(text)).support_ids()
    if max(ids) >= head.vocab_size:
        raise UserError(f"the support of {text} has id {max(ids)}, outside the vocabulary of {head.vocab_size} tokens")
    return ids


def _cost(plan: Plan, settings: ExtractSettings) -> str:
    through = sum(len(example) for example in plan.examples)
    kept = "" if settings.keep_top is None else f" for the {settings.keep_top:.0%} of highest entropy"
    return (
        f"part {settings.shard}: {plan.tokens:,} completion tokens of {len(plan.examples):,} examples, "
        f"{through:,} tokens through the model; {len(plan.shards)} shards, about {in_bytes(plan.bytes)}{kept}"
    )


def _summary(manifest: Manifest, folder: Path) -> str:
    dropped = ""
    if manifest.threshold is not None:
        total = manifest.tokens + manifest.dropped
        dropped = (
            f"; {manifest.dropped:,} tokens ({manifest.dropped / total:.1%}) of base entropy below "
            f"{manifest.threshold} nats were dropped"
        )
    return f"{manifest.tokens:,} tokens kept in {folder}, {in_bytes(manifest.bytes)}{dropped}."
