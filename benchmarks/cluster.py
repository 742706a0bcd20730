"""A step of reinforcement learning by workers beside one process: sampled tokens a second, bytes, and its parts.

Arms take turns at the same step, of the same layer and seed, each with one thread a worker:

    process     this process alone
    1 worker    a worker on a Ray cluster of this machine, and what gathers its gradients
    2 workers   two of them

Also printed: bytes of an update and worker in adapters, bytes of a sampled token, the seconds of a call that does
nothing, and what a step would take with 8, 64 and 512 workers, from what its parts took here:

    T(W) = ceil(P / W) s + U (ceil(P / W) g + 2 c + W a),

P parts that take s seconds to sample and g to take a gradient of, U updates, calls of c seconds, and a seconds to add a
worker's gradient. It leaves out what this machine cannot show: parts that take unequal time, and a network.

Target: one worker within 5% of the process.

    OMP_NUM_THREADS=1 uv run python benchmarks/cluster.py [--rounds 5] [--prompts 8] [--max-new-tokens 32]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from moe_bias.cluster.model import named_model
from moe_bias.cluster.policy import PartsCollector, policy_pool
from moe_bias.cluster.weights import row_of
from moe_bias.config import Cluster, RewardConfig, RLConfig
from moe_bias.frozen import load
from moe_bias.tasks.procedural import ProceduralTask
from moe_bias.training.objectives import DAPO
from moe_bias.training.optimisation import Optimisation
from moe_bias.training.problems import collector_of, fresh_policy_layer, rewards_of, task_data
from moe_bias.training.rl import Update
from side_by_side import ratio, take_turns, write_record

WORKERS = (1, 2)
SIMULATED = (8, 64, 512)
PARTS = 512
_CALLS = 200


def length_of(prompt: str, completion: str, gold: str) -> float:
    """A reward that differs within any group of a model that is not trained for the task."""
    return (len(completion) % 97) / 97


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        bench = Bench(options, stack)
        rates = take_turns(bench.arms, options.rounds)
        found = bench.told(rates)
    write_record("cluster", found | {"options": vars(options), "rates": rates})


class Bench:
    """A layer, the arms that take the same step of it, and what they were seen to do."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        base = load(options.model, device="cpu")
        task = ProceduralTask.sized_for_small_models("products", {})
        self.settings = RLConfig(
            prompts=options.prompts,
            group=options.group,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            batch_tokens=64,
            resamples=0,
            support="auto:4096",
        )
        data = task_data(base, task, task.problems(options.prompts + 2, 0), options.prompts)
        self.rewards = rewards_of(RewardConfig(verdict_weight=0.0, reward_weight=1.0), length_of)
        self.layer, self.head = fresh_policy_layer(data, self.settings).layer, base.head
        self.seen: dict[str, list[dict[str, float]]] = {}
        self.calls: list[float] = []
        collectors: dict[str, Any] = {"process": collector_of(data, self.rewards, self.settings)}
        for workers in WORKERS:
            name = f"{workers} worker{'s' if workers > 1 else ''}"
            own = (self.layer, data, self.rewards, self.settings, DAPO())
            pool = stack.enter_context(
                policy_pool(Cluster(workers=workers, ray=self._address(stack)), named_model(base), *own)
            )
            collectors[name] = PartsCollector(pool, *own[1:], texts_every=10**9)
            self.pool = pool
        self.arms = {name: self._arm(name, collector) for name, collector in collectors.items()}

    def _address(self, stack: ExitStack) -> str:
        """Of one cluster for all arms, started here."""
        import ray

        if not ray.is_initialized():
            from ray.cluster_utils import Cluster as Machines

            machines = Machines(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
            stack.callback(machines.shutdown)
            ray.init(machines.address, log_to_driver=False, logging_level="CRITICAL")
            stack.callback(ray.shutdown)
        return ""

    def _arm(self, name: str, collector: Any) -> Callable[[], int]:
        """One step; returns its sampled tokens."""

        def step() -> int:
            layer = copy.deepcopy(self.layer)
            update = Update(layer, self.head, self.settings, Optimisation(layer, self.settings, 1))
            started = time.perf_counter()
            collected = collector.collect(layer, 0)
            sampled = time.perf_counter()
            if collected.elsewhere is not None:
                metrics = update.over(collected.elsewhere, 0)
            else:
                metrics = update.learn(collected.batch, collected.sampled, 0)
            seconds = {"sampling": sampled - started, "updating": time.perf_counter() - sampled}
            tokens = sum(one.tokens for one in collected.judged)
            self.seen.setdefault(name, []).append({**metrics, **collected.moved, **seconds, "tokens": tokens})
            return tokens

        return step

    def told(self, rates: dict[str, list[float]]) -> dict[str, Any]:
        """Prints all, and gives what the record has of it."""
        ratios = {name: ratio(rates, name, "process") for name in rates if name != "process"}
        for name, values in rates.items():
            print(f"{name:<10} {statistics.median(values):8.1f} tokens/s   {ratios.get(name, '')}")
        adapter = 4 * row_of(self.layer).size
        last = self.seen["2 workers"][-1]
        print(f"adapter {adapter:,} bytes; an update moves {last['update_bytes_each'] / adapter:.2f} of it a worker")
        besides = last["sampling_bytes"] - last["workers"] * adapter
        print(f"a sampled token moves {besides / last['tokens']:.1f} bytes, with what goes and comes of its answer")
        parts = self._parts()
        print(", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in parts.items()))
        simulated = self._simulated(parts, last["updates"])
        for workers, row in simulated.items():
            print(f"{workers:>4} workers: {row['seconds']:.1f} s a step of {PARTS} parts, {row['share']:.1%} of ideal")
        return {
            "ratios": {name: asdict(value) for name, value in ratios.items()},
            "adapter_bytes": adapter,
            "steps": self.seen,
            "parts": parts,
            "simulated": simulated,
        }

    def _parts(self) -> dict[str, float]:
        """Seconds: of sampling a part, of its gradient in an update, of a call, of adding a worker's gradient."""
        one = self.seen["1 worker"][1:]
        parts = math.ceil(self.settings.prompts / self.settings.batch_size)
        sampling = statistics.median(step["sampling"] for step in one) / parts
        updating = statistics.median(step["updating"] / step["updates"] for step in one)
        member, started = self.pool.members()[0], time.perf_counter()
        for _ in range(_CALLS):
            self.pool.answer(self.pool.ask(member, "look", [], None, False, False, None))
        call = (time.perf_counter() - started) / _CALLS
        row, total, started = np.ones(row_of(self.layer).size, np.int64), 0, time.perf_counter()
        for _ in range(_CALLS):
            total = total + row
        adding = (time.perf_counter() - started) / _CALLS
        gradient = max(updating - 2 * call, 0.0) / parts
        return {"sample": sampling, "gradient": gradient, "call": call, "add": adding}

    def _simulated(self, parts: dict[str, float], updates: float) -> dict[str, dict[str, float]]:
        ideal = PARTS * (parts["sample"] + updates * parts["gradient"])
        found = {}
        for workers in SIMULATED:
            share = math.ceil(PARTS / workers)
            of_update = share * parts["gradient"] + 2 * parts["call"] + workers * parts["add"]
            seconds = share * parts["sample"] + updates * of_update
            found[str(workers)] = {"seconds": seconds, "share": ideal / workers / seconds}
        return found


if __name__ == "__main__":
    main()
