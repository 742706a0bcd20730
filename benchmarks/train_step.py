"""One optimiser step of MoE-Bias against one of LoRA on the same tokens: tokens per second.

Arms, each forward, backward and AdamW step on the same batch:

    lora      LoRA r = 8 on all linear layers (PEFT), through the model
    a         MoE-Bias on the whole vocabulary, through the model
    b         MoE-Bias on the whole vocabulary, on hidden states already extracted
    c         MoE-Bias on a support of 4,096, on hidden states already extracted
    matmul    the bare product of c, hidden states by M columns: the limit of c

Targets over LoRA on SmolLM2-135M: a 1.8x, b 8x, c 60x.

    uv run python benchmarks/train_step.py [--rounds 7] [--sequences 8] [--length 128]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from moe_bias import MoEBiasConfig
from moe_bias.adapter import find_adapter_head
from moe_bias.backbone import Head, find_head
from moe_bias.config import LayerConfig, ModelConfig
from moe_bias.features.extract import Features, run_backbone, with_scalars
from moe_bias.frozen import load_model
from moe_bias.layer import load_balance_loss
from moe_bias.tasks.conversations import Example
from moe_bias.training.gradients import gradients
from moe_bias.training.objectives import Supervised
from side_by_side import ratio, take_turns, write_record

SUPPORT = 4096
ARMS = ("a", "b", "c", "matmul")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    rates = take_turns(build_arms(options), options.rounds)
    print(f"{options.sequences} sequences of {options.length} tokens; tokens/s over LoRA's")
    ratios = {name: ratio(rates, name, "lora") for name in ARMS}
    for name, value in ratios.items():
        print(f"  {name:<8} {value}")
    print(f"  c runs at {ratio(rates, 'c', 'matmul')} of its bare matmul")
    write_record(
        "train_step",
        {"options": vars(options), "rates": rates, "ratio_to_lora": {name: vars(r) for name, r in ratios.items()}},
    )


def build_arms(options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """One step of every arm, all on the same random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, SUPPORT, (options.sequences, options.length), generator=generator)
    settings = ModelConfig(model=options.model)
    lora = get_peft_model(
        load_model(settings)[0], LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    model = load_model(settings)[0]
    head = find_head(model)[1]
    examples = [Example(row[:1], row[1:]) for row in ids.tolist()]
    hidden = run_backbone(model, examples, options.sequences, "hidden states")
    every = list(range(head.vocab_size))
    whole = with_scalars(head, hidden, every, "whole vocabulary")
    part = with_scalars(head, hidden, every[:SUPPORT], "support")
    adapted = get_peft_model(model, MoEBiasConfig()).train()
    return {
        "lora": through_model(lora, ids, lambda: torch.zeros(())),
        "a": through_model(adapted, ids, lambda: 0.01 * load_balance_loss(find_adapter_head(adapted).last.routing)),
        "b": on_features(whole, head, LayerConfig()),
        "c": on_features(part, head, LayerConfig(support=tuple(every[:SUPPORT]))),
        "matmul": bare_matmul(part, head),
    }


def through_model(model: Any, ids: torch.Tensor, auxiliary: Callable[[], torch.Tensor]) -> Callable[[], int]:
    """A step through the model, with the language-modelling loss of transformers."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> int:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss + auxiliary()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return ids.numel()

    return step


def on_features(features: Features, head: Head, config: LayerConfig) -> Callable[[], int]:
    """A step on hidden states, the support's base logits computed anew."""
    layer = head.layer(config)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    logits_of = head.columns(features.support)

    def step() -> int:
        optimizer.zero_grad()
        gradients(layer, features, lambda rows: logits_of(features.hidden[rows]), head.transform, Supervised())
        optimizer.step()
        return len(features)

    return step


def bare_matmul(features: Features, head: Head) -> Callable[[], int]:
    """Only the support's base logits."""
    logits_of = head.columns(features.support)

    def product() -> int:
        logits_of(features.hidden)
        return len(features)

    return product


if __name__ == "__main__":
    main()
