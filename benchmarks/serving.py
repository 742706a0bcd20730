"""Many tenants on one model that is served by vLLM: MoE-Bias adapters beside vLLM's own LoRA.

The load: requests that all come at once, with the same system prompt and a few tokens of their own each;
request i is for adapter i mod n. Every answer runs to the limit. The prefix cache is emptied before each
turn, so a turn is the first wave of requests. LoRA keeps a copy of the system prompt for each adapter: once
all copies are made, and as long as they fit into the cache, it no longer pays for them with time.

    plain       the model alone
    ours n      n MoE-Bias adapters on a support of 4,096; `--experts` and the options beside it choose their kind
    lora n      n adapters of LoRA, r = 8 on all linear layers, made with PEFT; `max_loras` is the largest n

Tokens/s are generated tokens over the turn. Time to first token counts from the moment when all requests
come. Targets: at 8 adapters at least 0.97x the plain model's tokens/s; the plain model's hit rate; at 64
adapters at least 2x LoRA's tokens/s. Runs where vLLM is installed, see CONTRIBUTING.md.

    python benchmarks/serving.py [--rounds 3] [--adapters 1 8 64] [--requests 64] [--system-tokens 1024]
    python benchmarks/serving.py --no-lora --rounds 9      # many more rounds in the time
    python benchmarks/serving.py --experts free --num-experts 16
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, get_args

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from peft import LoraConfig, get_peft_model
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from moe_bias.adapter.files import save_layer
from moe_bias.backbone import find_head
from moe_bias.config import Experts, LayerConfig, ModelConfig, Reach
from moe_bias.frozen import load_model, resolve_model
from side_by_side import ratio, take_turns, write_record

SUPPORT, RANK, OWN_TOKENS = 4096, 8, 32


@dataclass(frozen=True)
class Turn:
    """What one turn showed beside its rate.

    Seconds to the first token, the share of prompt tokens that were found in the prefix cache, and the
    bytes of the KV cache that were in use at most.
    """

    first_token: float
    hit_rate: float
    cache_bytes: float


class Arm:
    """A load on an engine. `run` answers it once and returns the tokens that were generated."""

    def __init__(self, engine: LLM, asked: list[dict[str, Any]]) -> None:
        self._engine: Any = engine.llm_engine
        self._asked = asked
        self.turns: list[Turn] = []

    def run(self) -> int:
        """Empties the prefix cache first."""
        self._engine.reset_prefix_cache()
        cache = self._engine.engine_core.engine_core.scheduler.kv_cache_manager
        first: dict[str, float] = {}
        done, used, start = [], 0.0, perf_counter()
        for number, request in enumerate(self._asked):
            self._engine.add_request(str(number), **request)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                first.setdefault(output.request_id, perf_counter() - start)
                done += [output] if output.finished else []
            used = max(used, cache.usage)
        found = sum(output.num_cached_tokens for output in done) / sum(len(output.prompt_token_ids) for output in done)
        held = used * self._engine.vllm_config.cache_config.kv_cache_memory_bytes
        self.turns.append(Turn(median(first.values()), found, held))
        return sum(len(output.outputs[0].token_ids) for output in done)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--system-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--cache-gib", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default="bundled")
    for name, choices in (("experts", get_args(Experts)), ("reach", get_args(Reach))):
        parser.add_argument(f"--{name}", choices=choices, default=LayerConfig.model_fields[name].default)
    for name in ("num_experts", "top_k", "expert_rank"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=LayerConfig.model_fields[name].default)
    parser.add_argument("--free-entries", action="store_true")
    parser.add_argument("--lora", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        write_adapters(Path(folder), options)
        arms = build_arms(Path(folder), options)
        rates = take_turns({name: arm.run for name, arm in arms.items()}, options.rounds)
    results = {name: result(rates, name, arms[name].turns[1:]) for name in arms}
    print_results(results)
    write_record(
        "serving" if options.lora else "serving_alone",
        {"options": vars(options), "vllm": vllm.__version__, "results": results},
    )


def write_adapters(folder: Path, options: argparse.Namespace) -> None:
    """Random adapters of both kinds, all different, in `ours` and `lora`."""
    model, _ = load_model(ModelConfig(model=options.model, device="cpu"))
    head = find_head(model)[1]
    chosen = {name: value for name, value in vars(options).items() if name in LayerConfig.model_fields}
    torch.manual_seed(0)
    for number in range(max(options.adapters)):
        layer = head.layer(LayerConfig(support=tuple(range(SUPPORT)), **chosen))
        for part in (layer.experts, layer.directions, layer.writes):
            if part is not None:
                torch.nn.init.normal_(part, std=0.01)
        save_layer(layer, folder / "ours" / f"a{number}", model)
    adapted: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    for number in range(max(options.adapters)):
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder / "lora" / f"a{number}")


def build_arms(folder: Path, options: argparse.Namespace) -> dict[str, Arm]:
    """Every arm on the same prompts; those of one kind share an engine."""
    arms = {"plain": Arm(start(options), load(options, [{}]))}
    with served_from(folder / "ours"):
        ours = start(options)
    for count in options.adapters:
        biased = [{"params": answers(options, extra_args={"moe_bias": f"a{number}"})} for number in range(count)]
        arms[f"ours {count}"] = Arm(ours, load(options, biased))
    if options.lora:
        lora = start(options, enable_lora=True, max_loras=max(options.adapters), max_lora_rank=RANK)
        for count in options.adapters:
            ranked = [
                {"lora_request": LoRARequest(f"a{number}", number + 1, str(folder / "lora" / f"a{number}"))}
                for number in range(count)
            ]
            arms[f"lora {count}"] = Arm(lora, load(options, ranked))
    return arms


@contextmanager
def served_from(folder: Path) -> Iterator[None]:
    """An engine that is made in here serves the adapters of the folder."""
    os.environ["MOE_BIAS_ADAPTERS"] = str(folder)
    yield
    del os.environ["MOE_BIAS_ADAPTERS"]


def start(options: argparse.Namespace, **choices: Any) -> LLM:
    """An engine in this process. Eager everywhere: LoRA on a CPU is not compiled."""
    return LLM(
        resolve_model(options.model),
        dtype=options.dtype,
        max_model_len=options.system_tokens + OWN_TOKENS + options.new_tokens,
        max_num_seqs=options.requests,
        kv_cache_memory_bytes=options.cache_gib * 2**30,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        **choices,
    )


def load(options: argparse.Namespace, tenants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests, which go to the tenants by turns."""
    draw = torch.Generator().manual_seed(0)
    system = torch.randint(10, 1000, (options.system_tokens,), generator=draw).tolist()
    own = torch.randint(10, 1000, (options.requests, OWN_TOKENS), generator=draw).tolist()
    return [
        {"prompt": {"prompt_token_ids": system + tokens}, "params": answers(options), **tenants[number % len(tenants)]}
        for number, tokens in enumerate(own)
    ]


def answers(options: argparse.Namespace, **choices: Any) -> SamplingParams:
    """Greedy answers that run to the limit."""
    return SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True, **choices)


def result(rates: dict[str, list[float]], name: str, turns: list[Turn]) -> dict[str, Any]:
    """Everything about one arm. LoRA with as many adapters is what ours is set beside."""
    found: dict[str, Any] = {"rates": rates[name], "turns": [asdict(turn) for turn in turns]}
    found["ratio_to_plain"] = vars(ratio(rates, name, "plain"))
    beside = name.replace("ours", "lora")
    if beside != name and beside in rates:
        found["ratio_to_lora"] = vars(ratio(rates, name, beside))
    return found


def print_results(results: dict[str, dict[str, Any]]) -> None:
    """One line an arm, of medians."""
    print(f"{'':10} {'tokens/s':>9} {'x plain':>8} {'x lora':>8} {'first token':>12} {'cache hits':>11} {'cache':>10}")
    for name, found in results.items():
        beside = f"{found['ratio_to_lora']['median']:.3f}" if "ratio_to_lora" in found else ""
        first, hits, held = (median(turn[key] for turn in found["turns"]) for key in found["turns"][0])
        speed = f"{median(found['rates']):9.1f} {found['ratio_to_plain']['median']:8.3f} {beside:>8}"
        print(f"{name:10} {speed} {first:10.2f} s {100 * hits:10.1f}% {held / 2**20:6.0f} MiB")


if __name__ == "__main__":
    main()
