"""`train draft --dry-run`: what a draft's training would hold, of both models, and how long it would take.

Answers that a model is to give first are taken to be as long as they may become.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moe_bias.adapter.saved import read_saved
from moe_bias.api.data import Texts
from moe_bias.api.drafts import refuse_longer, refuse_other_vocabulary
from moe_bias.commands.draft_settings import TrainDraftSettings
from moe_bias.commands.dry_subject import Subject, say_held, say_model, say_untried
from moe_bias.commands.material import texts_named
from moe_bias.commands.trial import answering_rate, draft_rates, forward_rate
from moe_bias.config import OWN_SUPPORT, LayerConfig
from moe_bias.features.examples import encoded, length_limit, split
from moe_bias.features.manifest import read_manifest
from moe_bias.frozen import cache_folder
from moe_bias.limits import in_time
from moe_bias.progress import say
from moe_bias.tasks.conversations import Example, encode_prompt
from moe_bias.training.budget import DraftBudget, StoreBudget, SupervisedBudget, Text, layer_of


def draft(console: Console, settings: TrainDraftSettings) -> None:
    """Prints it all. Raises UserError on models and data that the run would refuse before it begins."""
    small = Subject.of(settings)
    large = Subject.of(settings.model_copy(update={"model": settings.target}))
    refuse_other_vocabulary(small.tokenizer, large.tokenizer)
    material = _sampled(settings, small) if settings.own_samples else _given(settings, small, console)
    longest = max(map(len, material.examples))
    refuse_longer(large, longest)
    layer = _layer(settings, small)
    train = min(material.train_tokens, settings.train_tokens or material.train_tokens)
    text = Text.of(material.examples)
    own = SupervisedBudget(
        StoreBudget(small.size, Text(0, 0) if settings.store else text, small.size.dtype), settings, layer, train
    )
    budget = DraftBudget(own, StoreBudget(large.size, text, large.size.dtype))
    say_model(console, small, layer)
    say_model(console, large, None)
    _say_passes(console, settings, budget)
    say_held(console, list(budget.held()), small.device, settings.features or cache_folder())
    _say_hours(console, settings, small, large, budget, material.examples)


@dataclass(frozen=True)
class _Material:
    """Answers with their prompts, and the tokens of those that are trained on."""

    examples: list[Example]
    train_tokens: int


def _given(settings: TrainDraftSettings, small: Subject, console: Console) -> _Material:
    texts, limit = texts_named(settings), length_limit(small, settings.max_length)
    corpus = encoded(texts.conversations, small.tokenizer, limit, texts.source, console)
    held_out = set(texts.held_out(corpus.rows, settings.held_out, settings.seed))
    pairs = zip(corpus.rows, corpus.examples, strict=True)
    return _Material(corpus.examples, sum(len(example.completion_ids) for row, example in pairs if row not in held_out))


def _sampled(settings: TrainDraftSettings, small: Subject) -> _Material:
    """Answers of as many tokens as they may have; which tokens does not matter."""
    texts: Texts = texts_named(settings)
    answer = [0] * settings.max_new_tokens
    examples = [Example(encode_prompt(one, small.tokenizer), answer) for one in texts.conversations]
    held_out = split(range(len(examples)), settings.held_out, settings.seed, texts.source)
    return _Material(examples, (len(examples) - len(held_out)) * len(answer))


def _layer(settings: TrainDraftSettings, small: Subject) -> LayerConfig:
    if settings.adapter is not None:
        return read_saved(settings.adapter)[0].layer_config()
    if settings.store and settings.support == OWN_SUPPORT:
        return settings.layer_config(read_manifest(Path(settings.store[0])).support)
    return layer_of(settings, small.size.vocab_size)


def _say_passes(console: Console, settings: TrainDraftSettings, budget: DraftBudget) -> None:
    own, through = budget.own, budget.target.text.through
    models = "the target" if settings.store else "each model"
    most = "up to " if settings.own_samples else ""
    say(
        console,
        f"About {own.train_tokens:,} tokens to train on, {settings.epochs:,} times, {settings.batch_tokens:,} a step. "
        f"{most.capitalize()}{through:,} tokens go through {models} once, prompts counted, and {most}"
        f"{budget.target.text.tokens:,} hidden states through both output embeddings.",
    )


def _say_hours(
    console: Console,
    settings: TrainDraftSettings,
    small: Subject,
    large: Subject,
    budget: DraftBudget,
    examples: list[Example],
) -> None:
    if small.base is None or large.base is None:
        for one in (small, large):
            if one.base is None:
                say_untried(console, one)
        return
    if settings.own_samples:
        asked = large.base if settings.own_samples == "target" else small.base
        rate = answering_rate(asked, [example.prompt_ids for example in examples], settings)
        taken = in_time(budget.target.text.tokens / rate.answers)
        say(
            console,
            f"{rate.answers:,.0f} tokens a second were sampled, in {rate.rows:,} rows: answers that are all as long as "
            f"they may be take {taken}.",
        )
    rates = draft_rates(small.base, large.base, examples, settings, budget.own.layer)
    sides = [("target", large.base)] if settings.store else [("draft", small.base), ("target", large.base)]
    for name, base in sides:
        forward = forward_rate(base, examples)
        taken = in_time(budget.target.text.through / forward)
        say(console, f"{forward:,.0f} tokens a second went through the {name}: its one pass takes {taken}.")
    once, passes = in_time(budget.target.text.tokens / rates.both), in_time(budget.own.seen_tokens / rates.training)
    say(
        console,
        f"{rates.both:,.0f} a second went through both output embeddings, {rates.training:,.0f} through training: the "
        f"one takes {once}, the other {passes}.",
    )
