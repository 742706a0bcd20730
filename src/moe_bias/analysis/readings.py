"""What a layer does at each token: entropies, exact KL, the bias, the experts, the choices of base and adapted model.

With z the base's final logits, S the support and d the move that the layer makes there (s b, as far as
a soft-cap lets it), per token:

    entropies of softmax(z) and softmax(z'), KL(softmax(z') || softmax(z)), log-probabilities of the realised token
    w and the k experts with their gates; mean and largest |b| over the support, b before the strength s
    the tokens of largest z and of largest z', which greedy decoding would choose

`read_tokens` takes them from the whole vocabulary. `read_features` takes the same from stored features, with
the support's columns and two scalars in place of the vocabulary (see `support`). R bounds every logit off
the support: where the largest logits on it exceed R, before and after the move, both choices lie in the
support. Only the other tokens, on text that the support covers well a few in a hundred, go through the
output embedding. No backbone is run.

Shapes: T tokens, C a chunk of them, D hidden, V vocabulary, M support, K routed experts, N tokens listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.backbone import Head, adapted_logits
from moe_bias.columns import Columns, joined
from moe_bias.features.extract import Features, chunk_rows
from moe_bias.layer import Mixture, MoEBiasLayer, entropy_from_logits
from moe_bias.support import PolicyStats, full_log_prob, full_stats, reduced_stats


@dataclass(frozen=True)
class TokenReadings(Columns):
    """Each (T,) but experts and gates (T, K), largest gate first; entropies, KL and log-probabilities in nats.

    `bias_mean` and `bias_max` are of |b| over the support; `base_choice` and `adapted_choice` int64 token ids.
    """

    base_entropy: Tensor
    adapted_entropy: Tensor
    kl: Tensor
    weight: Tensor
    experts: Tensor
    gates: Tensor
    bias_mean: Tensor
    bias_max: Tensor
    base_choice: Tensor
    adapted_choice: Tensor
    base_log_prob: Tensor
    adapted_log_prob: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def flipped(self) -> Tensor:
        """(T,) bool: where greedy decoding would go another way."""
        return self.base_choice != self.adapted_choice


@dataclass(frozen=True)
class TopTokens(Columns):
    """The likeliest tokens of both distributions, ids (T, N) int64 and probabilities (T, N), largest first."""

    base_ids: Tensor
    base_probs: Tensor
    adapted_ids: Tensor
    adapted_probs: Tensor


@torch.no_grad()
def read_tokens(layer: MoEBiasLayer, head: Head, hidden_TD: Tensor, token_T: Tensor) -> TokenReadings:
    """The plain way, over the whole vocabulary: hidden states and the tokens that follow them. On the CPU."""
    parts = []
    for hidden_CD, token_C in zip(hidden_TD.split(chunk_rows(head)), token_T.split(chunk_rows(head)), strict=True):
        parts.append(_read_whole(layer, head, hidden_CD.to(head.device), token_C.to(head.device)))
    return joined(parts).to("cpu")


@torch.no_grad()
def read_features(
    layer: MoEBiasLayer, head: Head, batch: Features, support_logits: Callable[[Tensor], Tensor]
) -> TokenReadings:
    """The same from features on the layer's own support, on the layer's device; `support_logits` are `head.columns`."""
    logits_TM = support_logits(batch.hidden)
    mixture = layer.mix(batch.hidden, batch.entropy)
    bias_TM, move_TM = _bias_and_move(layer, head, mixture, logits_TM)
    stats = reduced_stats(logits_TM, move_TM, batch.rest)
    moved_T = move_TM.gather(-1, batch.column.clamp(min=0)[:, None]).squeeze(-1)
    adapted_logit_T = batch.logit.double() + torch.where(batch.column >= 0, moved_T, 0)
    choices = _choices(head, batch, logits_TM, logits_TM + move_TM)
    log_probs = (batch.logit - batch.log_partition, adapted_logit_T - stats.log_partition)
    return _readings(layer, batch.entropy, mixture, bias_TM, stats, choices, log_probs)


@torch.no_grad()
def top_tokens(layer: MoEBiasLayer, head: Head, hidden_TD: Tensor, count: int) -> TopTokens:
    """The `count` likeliest tokens before and after the layer, over the whole vocabulary. On the CPU."""
    parts = []
    for chunk_CD in hidden_TD.split(chunk_rows(head)):
        hidden_CD = chunk_CD.to(head.device)
        logits_CV = head.logits(hidden_CD.to(head.dtype))
        adapted_CV = adapted_logits(layer, head.transform, hidden_CD, entropy_from_logits(logits_CV), logits_CV)
        base, adapted = (values_CV.softmax(-1).topk(count, dim=-1) for values_CV in (logits_CV, adapted_CV))
        parts.append(TopTokens(base.indices, base.values, adapted.indices, adapted.values))
    return joined(parts).to("cpu")


def _read_whole(layer: MoEBiasLayer, head: Head, hidden_CD: Tensor, token_C: Tensor) -> TokenReadings:
    logits_CV = head.logits(hidden_CD.to(head.dtype))
    entropy_C = entropy_from_logits(logits_CV)
    support_M = layer.support_or_all().to(head.device)
    mixture = layer.mix(hidden_CD, entropy_C)
    bias_CM, move_CM = _bias_and_move(layer, head, mixture, logits_CV[:, support_M])
    adapted_CV = logits_CV.index_add(-1, support_M, move_CM.to(logits_CV.dtype))
    log_probs = (
        full_log_prob(logits_CV, torch.zeros_like(move_CM), support_M, token_C),
        full_log_prob(logits_CV, move_CM, support_M, token_C),
    )
    choices = (logits_CV.argmax(-1), adapted_CV.argmax(-1))
    return _readings(layer, entropy_C, mixture, bias_CM, full_stats(logits_CV, move_CM, support_M), choices, log_probs)


def _bias_and_move(layer: MoEBiasLayer, head: Head, mixture: Mixture, logits_TM: Tensor) -> tuple[Tensor, Tensor]:
    """The bias b and the move d, both (T, M), for the final base logits of the support."""
    bias_TM = layer.bias_of(mixture)
    return bias_TM, head.transform.reachable(logits_TM, layer.strength * bias_TM)


def _choices(head: Head, batch: Features, logits_TM: Tensor, adapted_TM: Tensor) -> tuple[Tensor, Tensor]:
    """The ids (T,) of the largest base logit and of the largest adapted one."""
    on_support = [part_TM.max(-1) for part_TM in (logits_TM, adapted_TM)]
    largest = [found.values for found in on_support]
    choices = [batch.support[found.indices] for found in on_support]
    open_T = torch.minimum(*largest) <= batch.rest.log_sum_exp
    for rows_C in open_T.nonzero().squeeze(-1).split(chunk_rows(head)):
        logits_CV = head.logits(batch.hidden[rows_C].to(head.dtype)).index_fill(-1, batch.support, -math.inf)
        off_support = logits_CV.max(-1)
        for choice_T, largest_T in zip(choices, largest, strict=True):
            is_off_C = off_support.values > largest_T[rows_C]
            choice_T[rows_C] = torch.where(is_off_C, off_support.indices, choice_T[rows_C])
    return choices[0], choices[1]


def _readings(
    layer: MoEBiasLayer,
    entropy_T: Tensor,
    mixture: Mixture,
    bias_TM: Tensor,
    stats: PolicyStats,
    choices: tuple[Tensor, Tensor],
    log_probs: tuple[Tensor, Tensor],
) -> TokenReadings:
    gates = mixture.routing.gates.topk(layer.config.top_k, dim=-1)
    size_TM = bias_TM.abs()
    return TokenReadings(
        base_entropy=entropy_T,
        adapted_entropy=stats.entropy,
        kl=stats.kl,
        weight=mixture.weight,
        experts=gates.indices,
        gates=gates.values,
        bias_mean=size_TM.mean(-1),
        bias_max=size_TM.amax(-1),
        base_choice=choices[0],
        adapted_choice=choices[1],
        base_log_prob=log_probs[0].to(stats.entropy.dtype),
        adapted_log_prob=log_probs[1].to(stats.entropy.dtype),
    )
