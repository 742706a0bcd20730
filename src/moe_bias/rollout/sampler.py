"""What a sampler for reinforcement learning promises: samples, and all that training needs of them.

A sampler answers each prompt several times under a layer, at a temperature T, and keeps of every
sampled token what it computed on the way: the hidden state, the scalars of the frozen model (see
`support`; those of u = z / T), and the log-probability under the policy that sampled it. Training
then needs no pass of the frozen model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_bias.features.extract import Features, place_in_example, support_columns
from moe_bias.layer import MoEBiasLayer
from moe_bias.limits import in_bytes
from moe_bias.mistakes import UserError
from moe_bias.rollout.decoding import Answer
from moe_bias.support import RestScalars

BUFFER_BYTES = 4 * 2**30
"""What a step's features may take where nothing else is said."""


@dataclass(frozen=True)
class SamplingChoices:
    """How to sample: `group` samples a prompt, `batch_size` prompts at once, `stop_ids` end an answer.

    `first_token_only`: the layer acts on the first token of an answer and the frozen model alone on
    the others. `keep_above`: hidden states are wanted of those tokens alone at which the policy's entropy
    is at least so many nats (None: of all); a sampler may keep more. Raises UserError on values that
    cannot be, and on those that would falsify what is kept.
    """

    temperature: float
    max_new_tokens: int
    group: int
    batch_size: int
    stop_ids: Sequence[int]
    top_p: float = 1.0
    first_token_only: bool = False
    keep_above: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(
                f"temperature = {self.temperature} cannot be sampled at; use greedy answers, or a value above 0"
            )
        if self.top_p != 1.0:
            raise UserError(
                f"top_p = {self.top_p} samples from a cut distribution, for which the stored log-probabilities and "
                "scalars would be wrong; use 1"
            )
        for name in ("max_new_tokens", "group", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} samples nothing; use 1 or more")


@dataclass(frozen=True)
class Rollouts:
    """N = prompts x group samples; sample i answers prompt i // group. T sampled tokens in all.

    Tokens stand sample after sample, end tokens included. `features` are those of every sampled
    token, on the CPU: `logit` (u_y), `log_partition` and `rest` are of u = z / T, at the temperature,
    `entropy` is the base entropy at temperature 1 that the gate reads, `example` is the sample's
    number. `log_prob` (T,) float32 is the token's under the policy that sampled it, `policy_entropy`
    (T,) float32 that policy's entropy in nats, both at the temperature. `biased` (T,) bool tells where
    the layer acted: training must not move the other tokens. `kept` (T,) bool tells where the hidden state
    is there; elsewhere it is zeros, `logit` says nothing, and training must leave the token out.
    `answers` are the N samples' token ids.
    """

    features: Features
    log_prob: Tensor
    policy_entropy: Tensor
    biased: Tensor
    kept: Tensor
    answers: list[Answer]
    group: int
    temperature: float


class Sampler(Protocol):
    """Samples from the frozen model under a layer."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        layer: MoEBiasLayer,
        choices: SamplingChoices,
        seed: int,
        description: str = "samples",
    ) -> Rollouts:
        """`choices.group` answers to each prompt. The same arguments give the same samples."""
        ...


@dataclass(frozen=True)
class SampledScalars:
    """Of every sampled token, each (T,): the token, and the columns of `Rollouts` and its features that go with it."""

    token: Tensor
    logit: Tensor
    entropy: Tensor
    log_partition: Tensor
    rest: RestScalars
    log_prob: Tensor
    policy_entropy: Tensor


def rollouts_of(
    hidden_TD: Tensor,
    scalars: SampledScalars,
    answers: list[Answer],
    layer: MoEBiasLayer,
    choices: SamplingChoices,
    kept_T: Tensor | None = None,
) -> Rollouts:
    """Rollouts of tokens that stand sample after sample, as many as the answers have with their end tokens.

    `kept_T` bool: see `Rollouts` (None: all).
    """
    length_N = torch.tensor([len(answer.all_ids) for answer in answers])
    example_T = torch.arange(len(answers)).repeat_interleave(length_N)
    support_M = layer.support_or_all().cpu()
    features = Features(
        hidden_TD,
        scalars.token,
        example_T,
        place_in_example(example_T),
        scalars.logit.float(),
        scalars.entropy.float(),
        scalars.log_partition,
        scalars.rest,
        support_columns(support_M, layer.vocab_size)[scalars.token],
        support_M,
    )
    biased_T = (features.position == 0) | (not choices.first_token_only)
    return Rollouts(
        features,
        scalars.log_prob.float(),
        scalars.policy_entropy.float(),
        biased_T,
        torch.ones_like(biased_T) if kept_T is None else kept_T,
        answers,
        choices.group,
        choices.temperature,
    )


def check_prompts(prompts: Sequence[list[int]], choices: SamplingChoices, token_bytes: int, buffer_bytes: int) -> None:
    """Raises UserError where there is no prompt, one is empty, or `buffer_bytes` might not hold what is kept."""
    if not prompts:
        raise UserError("no prompts to sample answers to")
    if [] in prompts:
        raise UserError(f"prompt {list(prompts).index([])} has no tokens; a sample needs one to follow")
    needed = len(prompts) * choices.group * choices.max_new_tokens * token_bytes
    if needed > buffer_bytes:
        raise UserError(
            f"buffer_bytes = {in_bytes(buffer_bytes)} cannot hold {len(prompts)} prompts x {choices.group} "
            f"samples x {choices.max_new_tokens} tokens of {in_bytes(token_bytes)}, {in_bytes(needed)}; raise it, or "
            "sample fewer at a time"
        )
