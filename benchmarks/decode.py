"""Generation with an adapter over the bare model: tokens per second and peak memory.

Arms: the bare model; MoE-Bias on a support of 4,096 and on the whole vocabulary; LoRA r = 8 on all
linear layers, unmerged (PEFT). Targets: at most 2% slower than the bare model with the support, at
most 5% with the whole vocabulary. The limit is the bare model: the layer can only add work. What it
adds per token is E x (D + M) multiply-adds for free experts, E (1 + R) x (D + M) for linear ones, and a
pass over V for the entropy. The layer is the one that the package makes where nothing is chosen.

    uv run python benchmarks/decode.py [--rounds 15] [--new-tokens 32] [--batches 1 16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from memory import peak_in_own_process, print_peak
from moe_bias import MoEBiasConfig
from moe_bias.config import LayerConfig, ModelConfig
from moe_bias.frozen import load_model
from side_by_side import ratio, take_turns, write_record

SUPPORT = 4096
PROMPT_TOKENS = 64
CONFIGS: dict[str, Callable[[], Any]] = {
    "bare": lambda: None,
    "moe-bias M=4096": lambda: MoEBiasConfig(support=list(range(SUPPORT))),
    "moe-bias M=V": lambda: MoEBiasConfig(),
    "lora r=8": lambda: LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
}


def main() -> None:
    """Measures and prints; each arm's memory is the peak of a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--memory-of", choices=list(CONFIGS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _generate_alone(options)
        return
    models = {name: adapted_model(name, options.model) for name in CONFIGS}
    results = [measure(models, batch, options) for batch in options.batches]
    layer = LayerConfig().model_dump()
    write_record("decode", {"options": vars(options), "layer": layer, "results": results})


def adapted_model(name: str, model_name: str) -> Any:
    """A model of its own for an arm, its adapter's weights random so that no shortcut applies."""
    torch.manual_seed(0)
    model, _ = load_model(ModelConfig(model=model_name))
    config = CONFIGS[name]()
    if config is None:
        return model
    adapted = get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.01)
    return adapted


def generate(model: Any, batch: int, new_tokens: int) -> int:
    """Greedy generation from random prompts; returns the number of new tokens."""
    prompt = torch.randint(10, 1000, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)
    with torch.inference_mode():
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
    return batch * new_tokens


def measure(models: dict[str, Any], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rates, ratios to the bare model and peak memory at one batch size, printed and returned."""
    arms = {name: lambda model=model: generate(model, batch, options.new_tokens) for name, model in models.items()}
    rates = take_turns(arms, options.rounds)
    result: dict[str, Any] = {"batch": batch, "rates": rates, "ratio_to_bare": {}, "peak_mib": {}}
    print(f"batch {batch}: speed over the bare model (1 is as fast), and peak memory of the process")
    for name in models:
        against_bare = ratio(rates, name, "bare")
        peak = _peak_of(name, batch, options)
        print(f"  {name:<18} {against_bare}  {peak:8.0f} MiB")
        result["ratio_to_bare"][name] = vars(against_bare)
        result["peak_mib"][name] = peak
    return result


def _peak_of(name: str, batch: int, options: argparse.Namespace) -> float:
    words = {"memory-of": name, "batches": batch, "new-tokens": options.new_tokens, "model": options.model}
    return peak_in_own_process(__file__, words).whole


def _generate_alone(options: argparse.Namespace) -> None:
    """Peak memory of generation: what loading the model took at its height is not counted."""
    model = adapted_model(options.memory_of, options.model)
    print_peak(lambda: generate(model, options.batches[0], options.new_tokens))


if __name__ == "__main__":
    main()
