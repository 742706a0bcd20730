"""`moe-bias train sft`: an adapter from prompts and answers, by supervised learning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_bias.adapter import save_layer
from moe_bias.backbone import Head, find_head, load_model
from moe_bias.commands.saved import refuse_overwriting
from moe_bias.config import Interrupted, TrainSFTSettings, UserError
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.evaluation.statistics import Estimate, ratio_of_sums
from moe_bias.layer import MoEBiasLayer
from moe_bias.records import provenance, write_json
from moe_bias.tasks.conversations import Conversation, Example, encode, end_of_turn, read_conversations
from moe_bias.training.sft import Prepared, fit, prepare


def run(settings: TrainSFTSettings) -> None:
    """Trains, measures on held-out examples, and saves adapter and record in `settings.output`.

    Raises UserError on data or settings that cannot be used, before the model is loaded where the
    data alone tells; Interrupted after saving what was trained so far.
    """
    console = Console()
    refuse_overwriting(settings.output)
    conversations = read_conversations(settings.data, settings.split)
    model, tokenizer = load_model(settings)
    head = find_head(model)[1]
    train, held_out = _split(_encoded(conversations, tokenizer, settings, console), settings)
    always = end_of_turn(conversations[0], tokenizer)
    prepared = prepare(model, head, train, held_out, settings, always=always, batch_size=settings.batch_size)
    layer = _fresh_layer(prepared, head, settings, console, model.num_parameters())
    _train(model, layer, prepared, head, settings)
    save_layer(layer, settings.output, model, prepared.fork_coverage)
    _report(console, layer, prepared, head, settings)


def _encoded(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSFTSettings,
    console: Console,
) -> list[Example]:
    """Examples that have a completion within the length limit; says how many have none."""
    encoded = [encode(conversation, tokenizer, settings.max_length) for conversation in conversations]
    examples = [example for example in encoded if example is not None]
    if len(examples) < len(encoded):
        console.print(
            f"{len(encoded) - len(examples)} of {len(encoded)} prompts alone fill --max-length {settings.max_length}; "
            "they are left out"
        )
    if len(examples) < 2:
        raise UserError(
            f"{settings.data} has {len(examples)} usable examples of {len(encoded)}; at least 2 are needed, "
            "one to train on and one to measure on"
        )
    return examples


def _split(examples: list[Example], settings: TrainSFTSettings) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, drawn with the seed; each part has at least one."""
    order = random.Random(settings.seed).sample(range(len(examples)), len(examples))
    held = min(max(round(settings.held_out * len(examples)), 1), len(examples) - 1)
    return [examples[index] for index in sorted(order[held:])], [examples[index] for index in sorted(order[:held])]


def _fresh_layer(
    prepared: Prepared, head: Head, settings: TrainSFTSettings, console: Console, model_parameters: int
) -> MoEBiasLayer:
    torch.manual_seed(settings.seed)
    layer = MoEBiasLayer(settings.layer_config(prepared.support), head.hidden_size, head.vocab_size).to(head.device)
    trainable = layer.config.num_parameters(head.hidden_size, head.vocab_size)
    console.print(
        f"{trainable:,} trainable parameters, {trainable / model_parameters:.3%} of the model's {model_parameters:,}; "
        f"{len(prepared.train):,} tokens to train on, {len(prepared.held_out):,} held out"
    )
    return layer


def _train(
    model: PreTrainedModel, layer: MoEBiasLayer, prepared: Prepared, head: Head, settings: TrainSFTSettings
) -> None:
    try:
        fit(layer, prepared.train, head, settings, "training")
    except KeyboardInterrupt as interrupt:
        save_layer(layer, settings.output, model, prepared.fork_coverage)
        raise Interrupted(f"the adapter as trained so far is in {settings.output}") from interrupt


def _report(console: Console, layer: MoEBiasLayer, prepared: Prepared, head: Head, settings: TrainSFTSettings) -> None:
    base, adapted = (per_example(token_nll(arm, prepared.held_out, head), prepared.held_out) for arm in (None, layer))
    counts = per_example(torch.ones(len(prepared.held_out)), prepared.held_out)
    estimates = {
        "base_nll": ratio_of_sums(base, counts),
        "adapted_nll": ratio_of_sums(adapted, counts),
        "change": ratio_of_sums(adapted - base, counts),
    }
    record = {name: asdict(estimate) for name, estimate in estimates.items()}
    settings_used = settings.model_dump(mode="json")
    write_json(settings.output / "record.json", {"settings": settings_used, "provenance": provenance(), **record})
    for name, estimate in estimates.items():
        console.print(f"held-out {name.replace('_nll', ' NLL per token'):<24} {_interval(estimate)}", highlight=False)
    console.print(f"Saved in {settings.output}.")


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
