"""Arms of the supervised comparison: MoE-Bias, parts of it left out, and LoRA, on the same tokens.

The names:

    moe-bias          as the settings say
    static            one expert without a gate: a plain vector of logit biases
    no-gate           without the entropy gate
    no-routing        one expert without a gate, its rank such that it has as many parameters: a plain low-rank map
    free              16 experts of free entries, top-2
    lora-head         LoRA on the output embedding alone, on the support, from the same stored hidden states
    full-vocabulary   a bias on every token in place of the support
    lora-tokens       LoRA on as many completion tokens as moe-bias is trained on, or as the settings say
    moe-bias-tokens   MoE-Bias on as many as the settings say for LoRA, where they say so
    lora-time         LoRA for as many seconds as moe-bias takes, its pass over the backbone included

LoRA is measured on exactly the tokens that the others are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_bias.evaluation.strata import by_stratum, counts_by_stratum
from moe_bias.experiments.cells import Cell, as_lists
from moe_bias.experiments.lora import Budget, LoRAChoices, lora_on, lora_token_nll, train_lora
from moe_bias.features.extract import Features
from moe_bias.tasks.conversations import Example

MAIN = "moe-bias"
LAYER_ARMS: dict[str, dict[str, Any]] = {
    MAIN: {},
    "static": {"experts": "free", "num_experts": 1, "top_k": 1, "entropy_gate": False},
    "no-gate": {"entropy_gate": False},
    "no-routing": {"num_experts": 1, "top_k": 1, "expert_rank": 31, "entropy_gate": False},
    "free": {"experts": "free", "num_experts": 16, "top_k": 2},
    "full-vocabulary": {"support": "all"},
}
LORA_HEAD = "lora-head"
LORA_ARMS = ("lora-tokens", "lora-time")
MAIN_ON_LORA_TOKENS = "moe-bias-tokens"


def lora_budget(name: str, main: Cell, tokens: int | None) -> Budget:
    """What a LoRA arm may spend, given the main arm of the same seed; `tokens` replace that arm's."""
    if name == "lora-tokens":
        return Budget(main.train_tokens if tokens is None else tokens, "tokens")
    return Budget(main.seconds + main.forward_seconds, "seconds")


def run_lora(
    name: str,
    model: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    features: Features,
    main: Cell,
    choices: LoRAChoices,
    token_limit: int | None,
    batch_size: int,
) -> Cell:
    """Trains and measures a LoRA arm with the main arm's seed; `features` are those of `held_out`.

    `token_limit` is how many tokens lora-tokens is trained on (None: as many as the main arm); `batch_size` examples
    are measured at a time.
    """
    tokens = torch.cat([torch.tensor(example.completion_ids) for example in held_out])
    assert torch.equal(tokens, features.token), "LoRA would be measured on other tokens"
    with lora_on(model, choices.rank, main.seed) as adapted:
        budget = lora_budget(name, main, token_limit)
        report = train_lora(adapted, train, choices, budget, main.seed, f"{name}, seed {main.seed}")
        nll_T = lora_token_nll(adapted, held_out, batch_size)
    return Cell(
        name=name,
        seed=main.seed,
        parameters=report.parameters,
        train_tokens=report.tokens,
        seconds=report.seconds,
        forward_seconds=0.0,
        nll=as_lists(by_stratum(nll_T, features)),
        tokens=as_lists(counts_by_stratum(features)),
    )
