"""Sampling that keeps what training needs, against transformers' own `generate`: tokens per second.

Arms, on the same left-padded batch of prompts x group rows, at the same temperature and token limit:

    generate        do_sample=True, top_k=0, top_p=1, num_return_sequences=group, and nothing kept
    sampler M=4096  TransformersSampler under a layer on a support of 4,096: hidden states and scalars kept
    sampler M=V     the same on the whole vocabulary
    launched M=...  on a GPU: the same sampler without its graph, every kernel launched one by one
    vllm M=4096     VllmSampler on an engine of vLLM in this process, with the same kept; with --engines
    vllm M=V        transformers vllm, in an environment with vLLM

Once as answers end, and once with every row run to the limit, which compares the steps alone. Tokens
are those sampled, end tokens with them and padding not. Targets: the samplers on transformers at least
1x, vLLM's 2x as fast as those.

    uv run python benchmarks/rollout.py [--rounds 5] [--prompts 4] [--group 8] [--max-new-tokens 96]
    python benchmarks/rollout.py --engines transformers vllm
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig, ModelConfig
from moe_bias.frozen import load_model, resolve_model
from moe_bias.rollout import decoding
from moe_bias.rollout.engines import EngineChoices
from moe_bias.rollout.sampler import Rollouts, Sampler, SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.rollout.vllm import local_sampler
from moe_bias.tasks.conversations import answer_ends, ask, encode_prompt
from moe_bias.tasks.procedural import ProceduralTask
from random_layer import random_layer
from side_by_side import ratio, take_turns, write_record

SUPPORTS = {"M=4096": tuple(range(4096)), "M=V": None}
TASK = "products"
CACHE_BYTES = 2**30
BIAS = 0.01
"""The size of biases: so small that answers are as long as the model's."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--engines", nargs="+", choices=("transformers", "vllm"), default=["transformers"])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    model, tokenizer = load_model(ModelConfig(model=options.model, device=options.device))
    problems = ProceduralTask.sized_for_small_models(TASK, {}).problems(options.prompts, 0)
    prompts = [encode_prompt(ask(problem.question), tokenizer) for problem in problems]
    head = find_head(model)[1]
    samplers: dict[str, Sampler] = {}
    if "transformers" in options.engines:
        samplers["sampler"] = TransformersSampler(model, head)
        if head.device.type == "cuda":
            samplers["launched"] = Launched(TransformersSampler(model, head))
    longest = max(map(len, prompts)) + options.max_new_tokens
    choices = EngineChoices(resolve_model(options.model), model.dtype, longest, CACHE_BYTES)
    with local_sampler(model, head, choices) if "vllm" in options.engines else nullcontext() as vllm:
        if vllm is not None:
            samplers["vllm"] = vllm
        stops = answer_ends(model, tokenizer)
        results = [measure(model, prompts, stops, ends, samplers, options) for ends in (True, False)]
    write_record("rollout", {"options": vars(options), "results": results})


@dataclass(frozen=True)
class Launched:
    """A sampler without a graph."""

    sampler: Sampler

    def sample(self, *args: Any) -> Rollouts:
        """See `Sampler`."""
        with mock.patch.object(decoding, "goes_into_a_graph", return_value=False):
            return self.sampler.sample(*args)


def measure(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stops: list[int],
    ends: bool,
    samplers: dict[str, Sampler],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Rates and their ratios to generate's, printed and returned. `ends`: whether answers end by themselves."""
    rates = take_turns(build_arms(model, prompts, stops, ends, samplers, options), options.rounds)
    ratios = {name: ratio(rates, name, "generate") for name in rates}
    print("answers end by themselves" if ends else "every row to the limit")
    for name, value in ratios.items():
        print(f"  {name:<15} {value}  {sum(rates[name]) / len(rates[name]):8.1f} tokens/s")
    return {"ends": ends, "rates": rates, "ratio_to_generate": {name: vars(value) for name, value in ratios.items()}}


def build_arms(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stops: list[int],
    ends: bool,
    samplers: dict[str, Sampler],
    options: argparse.Namespace,
) -> dict[str, Callable[[], int]]:
    """Every arm on the same prompts; each returns the tokens it sampled."""
    head = find_head(model)[1]
    choices = SamplingChoices(
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        group=options.group,
        batch_size=options.prompts,
        stop_ids=stops if ends else [],
    )
    seed = iter(range(10**9))

    def sampling(sampler: Sampler, support: tuple[int, ...] | None) -> Callable[[], int]:
        layer = random_layer(head, LayerConfig(support=support), BIAS)
        return lambda: len(sampler.sample(prompts, layer, choices, next(seed), "").log_prob)

    arms: dict[str, Callable[[], int]] = {"generate": lambda: generate(model, prompts, stops, ends, options)}
    return arms | {
        f"{name} {label}": sampling(sampler, support)
        for name, sampler in samplers.items()
        for label, support in SUPPORTS.items()
    }


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts: list[list[int]], stops: list[int], ends: bool, options: argparse.Namespace
) -> int:
    """Samples by transformers; returns their tokens, each answer's up to its first end token."""
    length = max(len(prompt) for prompt in prompts)
    output = model.generate(
        input_ids=torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=model.device),
        attention_mask=torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device),
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        top_p=1.0,
        num_return_sequences=options.group,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=0 if ends else options.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    ended_NL = torch.isin(output[:, length:], torch.tensor(stops, device=output.device))
    before_NL = ended_NL.cumsum(-1) - ended_NL.long()
    return int((before_NL == 0).sum())


if __name__ == "__main__":
    main()
