"""The arms of `update` that train on hidden states, and the limits that bind them.

An epoch is every token once, in random batches of 512: features gathered, forward, backward, AdamW.

Beside the layer, LoRA on the output embedding alone, s B A h added to the logits, the layer's nearest rival: the
hidden states that it reads never change either. Its forms on a support borrow the layer's reduced softmax.

Shapes: T tokens, D hidden, R rank, M support, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import Corpus
from moe_bias.backbone import Head
from moe_bias.config import LayerConfig
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.extract import Features
from moe_bias.features.source import Subset
from moe_bias.layer import MoEBiasLayer, load_balance_loss
from moe_bias.support import RHO, fork_threshold, log_prob_from_adapted
from moe_bias.training.gradients import gradients
from moe_bias.training.objectives import Supervised
from side_by_side import wait

BATCH = 512
RATE = 1e-3
EVERYTHING = 2**62
"""A budget of bytes that any logits fit into."""
RANK, FACTOR = 8, 2.0
"""Of LoRA on the output embedding: R, and alpha / R."""

Choices = Mapping[str, Any]
FREE: Choices = {"experts": "free", "num_experts": 16, "top_k": 2}
DEFAULT: Choices = {}
LAYERS = {"free": FREE, "default": DEFAULT}
"""What the layers that are measured choose, beside their support; 'default' is the package's own choice."""


@dataclass(frozen=True)
class Arm:
    """A step on a batch's token numbers, an epoch's batches, the corpus tokens that these stand for, what learns."""

    step: Callable[[Any], object]
    batches: Sequence[Tensor | slice]
    tokens: int
    layer: nn.Module | None = None

    def __call__(self) -> int:
        """An epoch; returns the corpus tokens."""
        for index in self.batches:
            self.step(index)
        wait()
        return self.tokens

    def beginning(self) -> Arm:
        """Its first two batches alone."""
        return replace(self, batches=self.batches[:2])


def head_autograd(corpus: Corpus, tokens: int, support: int, choices: Choices = FREE) -> Arm:
    """The plain reference: the whole vocabulary's log-softmax in float32, through autograd."""
    del support
    return _autograd(corpus.head, corpus.features(corpus.head.vocab_size, tokens), choices, _full_log_prob)


def support_autograd(corpus: Corpus, tokens: int, support: int, choices: Choices = FREE) -> Arm:
    """The reduced log-softmax of the support's columns as it stands in `support`, in float32, through autograd."""
    return _autograd(corpus.head, corpus.features(support, tokens), choices, _reduced_log_prob)


def full(corpus: Corpus, tokens: int, support: int, choices: Choices = FREE) -> Arm:
    """Ours with the whole vocabulary."""
    del support
    return _ours(corpus.head, corpus.features(corpus.head.vocab_size, tokens), choices, 0)


def reduced(corpus: Corpus, tokens: int, support: int, choices: Choices = FREE) -> Arm:
    """Ours with a support, whose base logits every step computes anew."""
    return _ours(corpus.head, corpus.features(support, tokens), choices, 0)


def kept(corpus: Corpus, tokens: int, support: int, choices: Choices = FREE) -> Arm:
    """Ours with a support, its base logits kept."""
    return _ours(corpus.head, corpus.features(support, tokens), choices, EVERYTHING)


def kept_forks(corpus: Corpus, tokens: int, support: int, choices: Choices = FREE) -> Arm:
    """`kept` on the tokens of highest base entropy alone; an epoch of them is one of the corpus."""
    features = corpus.features(support, tokens)
    is_fork_T = features.entropy >= fork_threshold(features.entropy, RHO)
    chosen = Subset(features, is_fork_T.nonzero().squeeze(-1))
    forks = chosen.at(torch.arange(len(chosen), device=is_fork_T.device))
    return replace(_ours(corpus.head, forks, choices, EVERYTHING), tokens=tokens)


def lora_head(corpus: Corpus, tokens: int, support: int) -> Arm:
    """LoRA on the output embedding, whole vocabulary, as it stands in PEFT: through autograd, all logits at once."""
    del support
    head, features = corpus.head, corpus.features(corpus.head.vocab_size, tokens)
    lora = _HeadLoRA(head.hidden_size, head.vocab_size).to(head.device)

    def loss_of(index: Tensor) -> Tensor:
        batch = features.at(index)
        with torch.no_grad():
            raw_TV = head.module(batch.hidden.to(head.dtype))
        return F.cross_entropy(head.transform.apply(raw_TV + lora(batch.hidden)), batch.token)

    return _by_autograd(lora, loss_of, features)


def lora_head_support(corpus: Corpus, tokens: int, support: int, budget: int = 0) -> Arm:
    """LoRA on the output embedding's rows of the support, with the reduced softmax and logits that the layer trains by.

    Base logits are kept where they fit into `budget` bytes.
    """
    head, features = corpus.head, corpus.features(support, tokens)
    lora = _HeadLoRA(head.hidden_size, len(features.support)).to(head.device)
    logits = BaseLogits(features, head, budget)

    def loss_of(index: Tensor) -> Tensor:
        batch = features.at(index)
        logits_TM = logits.of(index, batch)(slice(None))
        move_TM = head.transform.reachable(logits_TM, head.transform.scale * lora(batch.hidden))
        return -log_prob_from_adapted(batch.logit, batch.column, logits_TM + move_TM, batch.rest).mean()

    return _by_autograd(lora, loss_of, features)


def matmul_full(corpus: Corpus, tokens: int, support: int) -> Arm:
    """The limit of `full`: the bare product with the whole output embedding, 2 D V operations a token."""
    return matmul(corpus, tokens, corpus.head.vocab_size)


def matmul(corpus: Corpus, tokens: int, support: int) -> Arm:
    """The limit of `support`: the bare product with its columns, 2 D M operations a token."""
    logits_of = corpus.head.columns(torch.arange(support, device=corpus.head.device))
    hidden_TD = corpus.hidden.hidden[torch.arange(tokens) % len(corpus.hidden.hidden)].to(corpus.head.device)
    return Arm(lambda rows: logits_of(hidden_TD[rows]), _in_order(tokens), tokens)


def one_pass(corpus: Corpus, tokens: int, support: int) -> Arm:
    """The limit of `kept`: T x M float32 read once, in their order."""
    wide_TM = torch.randn(tokens, support, device=corpus.head.device)
    return Arm(lambda rows: wide_TM[rows].sum(), _in_order(tokens), tokens)


def fresh_layer(head: Head, features: Features, choices: Choices) -> MoEBiasLayer:
    """Always the same one for the same features and choices."""
    torch.manual_seed(0)
    support = None if len(features.support) == head.vocab_size else tuple(features.support.tolist())
    layer = head.layer(LayerConfig(support=support, **choices)).to(head.device)
    layer.calibrate(features.hidden)
    return layer


def batches_of(features: Features) -> Sequence[Tensor]:
    """Token numbers in batches, always in the same random order, where the features are."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return order.to(features.hidden.device).split(BATCH)


def _in_order(tokens: int) -> Sequence[slice]:
    return [slice(start, start + BATCH) for start in range(0, tokens, BATCH)]


def _ours(head: Head, features: Features, choices: Choices, budget: int) -> Arm:
    layer, logits = fresh_layer(head, features, choices), BaseLogits(features, head, budget)
    optimizer = _optimizer(layer)

    def step(index: Tensor) -> None:
        batch = features.at(index)
        optimizer.zero_grad()
        gradients(layer, batch, logits.of(index, batch), head.transform, Supervised())
        optimizer.step()

    return Arm(step, batches_of(features), len(features), layer)


def _autograd(
    head: Head, features: Features, choices: Choices, log_prob_of: Callable[[Features, Tensor, Tensor], Tensor]
) -> Arm:
    layer, logits_of = fresh_layer(head, features, choices), head.columns(features.support)

    def loss_of(index: Tensor) -> Tensor:
        batch = features.at(index)
        mixture = layer.mix(batch.hidden, batch.entropy)
        logits_TM = logits_of(batch.hidden)
        move_TM = head.transform.reachable(logits_TM, layer.bias_of(mixture))
        nll = -log_prob_of(batch, logits_TM, move_TM).mean()
        return nll + layer.config.load_balance_weight * load_balance_loss(mixture.routing)

    return _by_autograd(layer, loss_of, features)


def _by_autograd(module: nn.Module, loss_of: Callable[[Tensor], Tensor], features: Features) -> Arm:
    """Steps along the gradient that autograd takes of a batch's loss."""
    optimizer = _optimizer(module)

    def step(index: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(index).backward()
        optimizer.step()

    return Arm(step, batches_of(features), len(features), module)


class _HeadLoRA(nn.Module):
    """`s B A h` for some rows of the output embedding; B starts at zero, A as PEFT starts it."""

    def __init__(self, hidden_size: int, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a_RD = nn.Parameter(torch.empty(RANK, hidden_size))
        self.b_MR = nn.Parameter(torch.zeros(rows, RANK))
        nn.init.kaiming_uniform_(self.a_RD, a=5**0.5)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return F.linear(F.linear(hidden_TD, self.a_RD), FACTOR * self.b_MR)


def _full_log_prob(batch: Features, logits_TV: Tensor, move_TV: Tensor) -> Tensor:
    return -F.cross_entropy(logits_TV + move_TV, batch.token, reduction="none")


def _reduced_log_prob(batch: Features, logits_TM: Tensor, move_TM: Tensor) -> Tensor:
    adapted_TM = logits_TM + move_TM
    log_partition_T = torch.logaddexp(adapted_TM.logsumexp(-1), batch.rest.log_sum_exp.to(adapted_TM.dtype))
    held_T = adapted_TM.gather(-1, batch.column.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(batch.column >= 0, held_T, batch.logit) - log_partition_T


def _optimizer(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(layer.parameters(), lr=RATE, fused=True)


LAYER_ARMS: dict[str, Callable[[Corpus, int, int], Arm]] = {
    "head-autograd": head_autograd,
    "support-autograd": support_autograd,
    "full": full,
    "support": reduced,
    "kept": kept,
    "kept-top20": kept_forks,
    "default-full": partial(full, choices=DEFAULT),
    "default-support": partial(reduced, choices=DEFAULT),
    "default-kept": partial(kept, choices=DEFAULT),
    "default-kept-top20": partial(kept_forks, choices=DEFAULT),
    "lora-head": lora_head,
    "lora-head-support": lora_head_support,
    "lora-head-kept": partial(lora_head_support, budget=EVERYTHING),
    "matmul-full": matmul_full,
    "matmul": matmul,
    "pass": one_pass,
}
"""Those without a name of their layer before them are of free experts, as all were before there were others."""
