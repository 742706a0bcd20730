"""LoRA, what the adapter is compared with: on all linear layers of the backbone (PEFT), or on the output embedding.

Objective: the mean negative log-likelihood of a batch's completion tokens, the same tokens that the
adapter is trained on. AdamW without weight decay, a rate that falls linearly to 0 over the budget,
gradients clipped to norm 1. The budget is of completion tokens or of seconds.

Logits are made for completion tokens alone: a hook before the output embedding picks their hidden
states, so that the model's own forward still does to the logits whatever it does.

LoRA on the output embedding alone needs no backbone either: `z' = z + scale B A h` is a table and coefficients of
it, so that `HeadLoRA` trains on stored hidden states as a layer of ours does.

Shapes: B batch, L length, T completion tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from moe_bias.backbone import Head, output_embedding
from moe_bias.chunks import longest_first
from moe_bias.config import LayerConfig
from moe_bias.layer import Mixture, MoEBiasLayer, Routing, at_least_float32
from moe_bias.mistakes import UserError
from moe_bias.progress import meter
from moe_bias.tasks.conversations import Example

MAX_GRAD_NORM = 1.0
SCALE = 2
"""alpha / r."""


@dataclass(frozen=True)
class LoRAChoices:
    """Rank r, the learning rate that it starts with, and examples in one optimiser step."""

    rank: int = 8
    rate: float = 2e-4
    batch_size: int = 8


@dataclass(frozen=True)
class Budget:
    """What training may use up: an amount of completion tokens or of seconds."""

    amount: float
    unit: Literal["tokens", "seconds"]

    def used(self, tokens: int, seconds: float) -> float:
        """How much of the amount is gone, at most all of it."""
        return min(tokens if self.unit == "tokens" else seconds, self.amount)


@dataclass(frozen=True)
class LoRAReport:
    """Completion tokens trained on, seconds that took, and trainable parameters."""

    tokens: int
    seconds: float
    parameters: int


class HeadLoRA(MoEBiasLayer):
    """LoRA on the output embedding's rows of the support: `router.weight` is A (r, D), `experts` is B^T (r, M).

    No router and no gate: every token reads all r.
    """

    def __init__(self, head: Head, rank: int, support: tuple[int, ...] | None) -> None:
        config = LayerConfig(
            experts="free",
            num_experts=rank,
            top_k=rank,
            support=support,
            entropy_gate=False,
            load_balance_weight=0.0,
        )
        super().__init__(config, head.hidden_size, head.vocab_size)
        if self.router is None:  # of rank 1
            self.router = nn.Linear(head.hidden_size, rank, bias=False)
            self.reset_parameters()

    def mix(self, hidden: Tensor, entropy: Tensor) -> Mixture:
        """`scale A h` for hidden states (..., D); the routing is uniform, as there is none."""
        assert self.router is not None
        hidden = at_least_float32(hidden.detach())
        read = SCALE * F.linear(hidden, self.router.weight.to(hidden.dtype))
        even = torch.full_like(read, 1 / self.config.num_experts)
        return Mixture(read, torch.ones_like(read[..., 0]), Routing(even, even))


@contextmanager
def lora_on(model: nn.Module, rank: int, seed: int) -> Iterator[Any]:
    """The model with fresh LoRA weights while the block runs; afterwards the model is as it was."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type,unused-ignore]
    try:
        yield adapted
    finally:
        adapted.unload()


def train_lora(
    adapted: Any, examples: Sequence[Example], choices: LoRAChoices, budget: Budget, seed: int, description: str
) -> LoRAReport:
    """Trains in place. Raises UserError where the loss is not finite."""
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=choices.rate, weight_decay=0.0)
    tokens, started = 0, time.perf_counter()
    adapted.train()
    with meter(description, budget.amount, budget.unit) as bar:
        for batch in _random_batches(examples, choices.batch_size, seed):
            used = budget.used(tokens, time.perf_counter() - started)
            if used >= budget.amount:
                break
            optimizer.param_groups[0]["lr"] = choices.rate * (1 - used / budget.amount)
            loss = _step(adapted, batch, optimizer, parameters)
            tokens += sum(len(example.completion_ids) for example in batch)
            bar.advance(budget.used(tokens, time.perf_counter() - started) - used)
            bar.note(f"loss {loss:.3f}")
    adapted.eval()
    return LoRAReport(tokens, time.perf_counter() - started, sum(parameter.numel() for parameter in parameters))


def completion_log_prob(model: Any, examples: Sequence[Example]) -> Tensor:
    """Log-probabilities (T,) of the completion tokens, example after example; with a graph where one is kept."""
    device = next(model.parameters()).device
    rows = [torch.tensor(example.prompt_ids + example.completion_ids) for example in examples]
    lengths = torch.tensor([len(row) for row in rows])
    prompts = torch.tensor([len(example.prompt_ids) for example in examples])
    input_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    place_L = torch.arange(input_BL.shape[1])
    mask_BL = place_L < lengths[:, None]
    predicts_BL = (place_L >= prompts[:, None] - 1) & (place_L < lengths[:, None] - 1)
    token_T = torch.cat([torch.tensor(example.completion_ids) for example in examples]).to(device)
    with _logits_of_only(model, predicts_BL.to(device)):
        output = model(input_ids=input_BL.to(device), attention_mask=mask_BL.long().to(device), use_cache=False)
    return -F.cross_entropy(at_least_float32(output.logits[0]), token_T, reduction="none")


@torch.no_grad()
def lora_token_nll(model: Any, examples: Sequence[Example], batch_size: int) -> Tensor:
    """Negative log-likelihood (T,) float32 in nats of all completion tokens, in the order of features."""
    parts: dict[int, Tensor] = {}
    for batch in longest_first(examples, batch_size):
        nll_T = -completion_log_prob(model, [examples[index] for index in batch]).cpu()
        sizes = [len(examples[index].completion_ids) for index in batch]
        parts.update(zip(batch, nll_T.split(sizes), strict=True))
    return torch.cat([parts[index] for index in range(len(examples))])


def _step(adapted: Any, batch: Sequence[Example], optimizer: torch.optim.Optimizer, parameters: list[Any]) -> float:
    optimizer.zero_grad()
    loss = -completion_log_prob(adapted, batch).mean()
    if not torch.isfinite(loss):
        raise UserError(f"the loss of LoRA became {loss.item()}; lower `lora_rate`")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    return loss.item()


@contextmanager
def _logits_of_only(model: Any, chosen_BL: Tensor) -> Iterator[None]:
    """While open, the output embedding sees the chosen positions alone, as one row (1, T, D)."""
    hook = output_embedding(model).register_forward_pre_hook(lambda _, inputs: (inputs[0][chosen_BL][None],))
    try:
        yield
    finally:
        hook.remove()


def _random_batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Without end, each pass in a new order."""
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), size):
            yield [examples[index] for index in order[start : start + size]]
