"""Greedy answers of several policies at once, from one model and one cache.

A policy changes logits after the output embedding and the backbone never sees it, so every policy's
rows share one batch, prompts are computed once for all policies, and finished rows are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from moe_bias.backbone import Head, HeadTransform, captured_hidden
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.progress import Meter, meter

Policy = Callable[[Tensor, Tensor], Tensor]
"""From hidden states (B, D) and final base logits (B, V) to the policy's logits (B, V)."""


def base_policy(hidden_BD: Tensor, logits_BV: Tensor) -> Tensor:
    """The frozen model as it is."""
    return logits_BV


def layer_policy(layer: MoEBiasLayer, transform: HeadTransform) -> Policy:
    """The frozen model under a MoE-Bias layer."""

    def policy(hidden_BD: Tensor, logits_BV: Tensor) -> Tensor:
        bias_BM = layer(hidden_BD, entropy_from_logits(logits_BV)).bias
        return logits_BV + transform.reachable(logits_BV, layer.on_vocabulary(layer.strength * bias_BM))

    return policy


@dataclass(frozen=True)
class Answer:
    """Generated token ids without the end token, and whether the end token came before the limit."""

    token_ids: list[int]
    finished: bool


@dataclass
class _Rows:
    """The rows still running: their number, policy, cache, attention mask (B, L) and next token (B,)."""

    number: Tensor
    policy: Tensor
    cache: DynamicCache
    mask: Tensor
    token: Tensor

    def keep(self, alive: Tensor) -> None:
        self.number, self.policy, self.token = self.number[alive], self.policy[alive], self.token[alive]
        self.mask = self.mask[alive]
        self.cache.batch_select_indices(alive.nonzero().squeeze(-1))


@torch.inference_mode()
def greedy_answers(
    model: nn.Module,
    head: Head,
    prompts: Sequence[list[int]],
    policies: Sequence[Policy],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    description: str = "answers",
) -> list[list[Answer]]:
    """Answers by policy, then by prompt. `batch_size` counts prompts; each has a row per policy."""
    answers: list[list[Answer]] = [[Answer([], False)] * len(prompts) for _ in policies]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with meter(description, len(prompts) * len(policies), "answers") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found = _answer_batch(model, head, [prompts[i] for i in batch], policies, stop_ids, max_new_tokens, bar)
            for policy, column in enumerate(found):
                for index, answer in zip(batch, column, strict=True):
                    answers[policy][index] = answer
    return answers


def _answer_batch(
    model: nn.Module,
    head: Head,
    prompts: Sequence[list[int]],
    policies: Sequence[Policy],
    stop_ids: Sequence[int],
    limit: int,
    bar: Meter,
) -> list[list[Answer]]:
    rows, hidden_BD = _prefill(model, prompts, len(policies))
    stops = torch.tensor(stop_ids, device=hidden_BD.device)
    written: list[list[int]] = [[] for _ in range(len(prompts) * len(policies))]
    finished = [False] * len(written)
    for step in range(limit):
        rows.token = _next_token(head, hidden_BD, rows.policy, policies)
        ended = torch.isin(rows.token, stops)
        for number, token, end in zip(rows.number.tolist(), rows.token.tolist(), ended.tolist(), strict=True):
            if end:
                finished[number] = True
            else:
                written[number].append(token)
        if ended.any():
            bar.advance(int(ended.sum()))
            rows.keep(~ended)
        if len(rows.number) == 0 or step == limit - 1:
            break
        hidden_BD = _decode(model, rows)
    bar.advance(len(rows.number))
    answers = [Answer(ids, end) for ids, end in zip(written, finished, strict=True)]
    return [answers[policy :: len(policies)] for policy in range(len(policies))]


def _prefill(model: nn.Module, prompts: Sequence[list[int]], copies: int) -> tuple[_Rows, Tensor]:
    """Runs the prompts once, left-padded, and repeats cache and hidden state for every policy."""
    device = next(model.parameters()).device
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache()
    with captured_hidden(model) as seen:
        model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
    cache.batch_repeat_interleave(copies)
    hidden_BD = seen[0][:, -1].repeat_interleave(copies, 0)
    number = torch.arange(len(hidden_BD), device=device)
    return _Rows(number, number % copies, cache, mask.repeat_interleave(copies, 0), number), hidden_BD


def _next_token(head: Head, hidden_BD: Tensor, policy_B: Tensor, policies: Sequence[Policy]) -> Tensor:
    logits_BV = head.logits(hidden_BD)
    token_B = logits_BV.new_zeros(len(logits_BV), dtype=torch.int64)
    for number, policy in enumerate(policies):
        mine = (policy_B == number).nonzero().squeeze(-1)
        if len(mine):
            token_B[mine] = policy(hidden_BD[mine], logits_BV[mine]).argmax(-1)
    return token_B


def _decode(model: nn.Module, rows: _Rows) -> Tensor:
    rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.mask), 1)], dim=-1)
    with captured_hidden(model) as seen:
        model(
            input_ids=rows.token[:, None],
            attention_mask=rows.mask,
            position_ids=rows.mask.sum(-1, keepdim=True) - 1,
            past_key_values=rows.cache,
            use_cache=True,
        )
    return seen[0][:, -1]
