"""`moe-bias extract`: the hidden states of a corpus and their scalars, kept on disk for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_bias.backbone import Head
from moe_bias.cluster.connection import refuse_unusable
from moe_bias.cluster.extraction import shards_by
from moe_bias.commands.training_settings import ExtractSettings
from moe_bias.features.build import Choices, make_plan
from moe_bias.features.examples import encoded, length_limit
from moe_bias.features.fingerprint import model_facts
from moe_bias.features.making import made
from moe_bias.features.manifest import Manifest, read_manifest
from moe_bias.frozen import frozen
from moe_bias.limits import in_bytes
from moe_bias.mistakes import UserError
from moe_bias.progress import say, text_console
from moe_bias.tasks.columns import read_conversations
from moe_bias.tasks.conversations import answer_ends
from moe_bias.training.sft import parse_support


def run(settings: ExtractSettings) -> None:
    """Makes or continues the store in `settings.output`, saying before what it will cost and after what it holds.

    On several machines where `settings` say so. Raises UserError on data or settings that cannot be used; Interrupted,
    with what is whole.
    """
    console = text_console()
    refuse_unusable(settings)
    conversations = read_conversations(settings.data, settings.split, settings.train_on)
    base = frozen(settings.model_copy(update={"dtype": "auto"}))
    limit = length_limit(base.model, settings.max_length)
    corpus = encoded(conversations, base.tokenizer, limit, settings.data, console)
    choices = _choices(settings, base.head, answer_ends(base.model, base.tokenizer))
    plan = make_plan(corpus, settings.data, model_facts(base.model, base.head, base.tokenizer), choices)
    by = shards_by(settings, base, settings.model, settings.device, settings.trust_remote_code)
    say(console, _summary(made(base.model, base.head, plan, settings.output, console, by), settings.output))


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


def _summary(manifest: Manifest, folder: Path) -> str:
    dropped = ""
    if manifest.threshold is not None:
        total = manifest.tokens + manifest.dropped
        dropped = (
            f"; {manifest.dropped:,} tokens ({manifest.dropped / total:.1%}) of base entropy below "
            f"{manifest.threshold} nats were dropped"
        )
    return f"{manifest.tokens:,} tokens kept in {folder}, {in_bytes(manifest.bytes)}{dropped}."
