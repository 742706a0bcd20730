"""A step of reinforcement learning against TRL's GRPOTrainer with LoRA: sampled tokens per second of updating.

Arms, on the same prompts, samples per prompt and token limit, one pass over a step's samples each:

    trl         LoRA r = 8 on all linear layers by GRPOTrainer, DAPO's loss, all tokens
    all         MoE-Bias on all tokens, support of 4,096, on what the sampler kept
    top20       MoE-Bias on the 20% of tokens of highest entropy

Each arm samples for itself; only the seconds of updating count, and all sampled tokens. Also printed:
the share of a whole step that updating takes with 4 passes, and the largest |log-probability in
training - in sampling| before any update, ours and TRL's.

Targets: 500x over trl for top20; under 2% of the step with 4 passes; a gap of at most 1e-5.

    uv run python benchmarks/rl_update.py [--rounds 3] [--prompts 8] [--group 8] [--max-new-tokens 64]
"""

from __future__ import annotations

import argparse
import time

import torch

from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig, ModelConfig, RLConfig
from moe_bias.experiments.grpo_lora import sampler_trainer_gap, train_grpo_lora
from moe_bias.experiments.grpo_trainer import GRPOChoices
from moe_bias.experiments.lora import lora_on
from moe_bias.features.extract import measure_fork_mass
from moe_bias.frozen import load_model
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.sampler import Rollouts, SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.support import choose_support
from moe_bias.tasks.conversations import answer_ends, ask, encode_prompt
from moe_bias.tasks.procedural import ProceduralTask
from moe_bias.training.advantage import select_high_entropy
from moe_bias.training.objectives import Sampled
from moe_bias.training.optimisation import Optimisation
from moe_bias.training.rl import Update
from random_layer import random_layer
from side_by_side import ratio, write_record

SUPPORT = 4096
EPOCHS = 4


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    bench = Bench(options)
    rates: dict[str, list[float]] = {"trl": [], "all": [], "top20": []}
    shares, gaps = [], []
    for turn in range(options.rounds + 1):  # the first one warms up
        measured = {"trl": bench.trl()} | bench.ours(turn)
        if turn:
            shares.append(measured.pop("share"))
            gaps.append(measured.pop("gap"))
            for name in rates:
                rates[name].append(measured[name])
    trl_gap = bench.trl_gap()
    ratios = {name: ratio(rates, name, "trl") for name in ("all", "top20")}
    for name, value in ratios.items():
        print(f"  {name:<8} {value} the sampled tokens per second of updating of trl")
    print(f"  updating takes {max(shares):.2%} of a step at most, with {EPOCHS} passes over the top 20%")
    print(f"  largest |log-prob in training - in sampling|: ours {max(gaps):.2e}, trl {trl_gap:.2e}")
    write_record(
        "rl_update",
        {
            "options": vars(options),
            "rates": rates,
            "ratio_to_trl": {name: vars(value) for name, value in ratios.items()},
            "share_of_step": shares,
            "gap": {"ours": gaps, "trl": trl_gap},
        },
    )


class Bench:
    """One model, and the prompts of a step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.tokenizer = load_model(ModelConfig(model=options.model, device=options.device))
        self.head = find_head(self.model)[1]
        problems = ProceduralTask.sized_for_small_models("products", {}).problems(options.prompts, 0)
        self.questions = [problem.question for problem in problems]
        self.prompts = [encode_prompt(ask(question), self.tokenizer) for question in self.questions]
        self.sampler = TransformersSampler(self.model, self.head)
        self.layer = self._layer()

    def trl(self) -> float:
        """Sampled tokens per second of updating."""
        with lora_on(self.model, 8, 0) as adapted:
            report = train_grpo_lora(adapted, self.tokenizer, self._chats(), rewards, self._grpo(1))
        return report.sampled_tokens / report.updating_seconds

    def trl_gap(self) -> float:
        """Of a few samples: TRL's scores are as wide as the vocabulary."""
        with lora_on(self.model, 8, 0) as adapted:
            choices = GRPOChoices(1, 1, self.options.group, self.options.max_new_tokens, micro_batch=self.options.group)
            return sampler_trainer_gap(adapted, self.tokenizer, self._chats(), choices).largest

    def ours(self, seed: int) -> dict[str, float]:
        """Sampled tokens per second of updating, the share of the whole step, and the gap."""
        started = time.perf_counter()
        rollouts = self._sample(self.layer, seed)
        sampling = time.perf_counter() - started
        found = {}
        for name, share in (("all", 1.0), ("top20", 0.2)):
            seconds, gap = self._update(rollouts, share, 1)
            found[name] = len(rollouts.features) / seconds
            found["gap"] = max(found.get("gap", 0.0), gap)
        updating = self._update(rollouts, 0.2, EPOCHS)[0]
        return {**found, "share": updating / (sampling + updating)}

    def _update(self, rollouts: Rollouts, share: float, epochs: int) -> tuple[float, float]:
        """Seconds from the sampler's tokens to the updated layer, and the gap."""
        settings = RLConfig(epochs=epochs, rho=share)
        update = Update(self.layer, self.head, settings, Optimisation(self.layer, settings, 1))
        advantage_T = torch.linspace(-1, 1, len(rollouts.features))
        kept = {name: tensor.clone() for name, tensor in self.layer.state_dict().items()}
        started = time.perf_counter()
        selected_T = select_high_entropy(rollouts.policy_entropy, share)[0]
        metrics = update.learn(
            rollouts.features.at(selected_T), Sampled(rollouts.log_prob, advantage_T).at(selected_T), 0
        )
        seconds = time.perf_counter() - started
        self.layer.load_state_dict(kept)
        return seconds, metrics["sampler_gap"]

    def _sample(self, layer: MoEBiasLayer, seed: int) -> Rollouts:
        stops = answer_ends(self.model, self.tokenizer)
        choices = SamplingChoices(1.0, self.options.max_new_tokens, self.options.group, self.options.prompts, stops)
        return self.sampler.sample(self.prompts, layer, choices, seed, "")

    def _layer(self) -> MoEBiasLayer:
        """A layer of the usual size, with biases that are not 0."""
        still = self.head.layer(LayerConfig(support=(0,)))
        hidden_TD = self._sample(still.to(self.head.device), 0).features.hidden
        support = tuple(choose_support(measure_fork_mass(self.head, hidden_TD).mass, SUPPORT))
        layer = random_layer(self.head, LayerConfig(support=support), 1.0)
        layer.calibrate(hidden_TD)
        return layer

    def _chats(self) -> list[list[dict[str, str]]]:
        return [[{"role": "user", "content": question}] for question in self.questions]

    def _grpo(self, steps: int) -> GRPOChoices:
        options = self.options
        return GRPOChoices(steps, options.prompts, options.group, options.max_new_tokens)


def rewards(prompts: list[object], completions: list[str], lengths: list[int]) -> list[float]:
    """Something that differs within a group."""
    return [len(text) % 7 / 6 for text in completions]


if __name__ == "__main__":
    main()
