"""Answers token by token: one batch, prompts computed once, finished rows dropped.

Rows of a batch share a cache; each prompt may have several rows. What chooses the next token is the
caller's: the largest logit of one of several policies, or a sample that is kept with its scalars.

Shapes: B rows still running, L tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moe_bias.backbone import captured_hidden
from moe_bias.limits import refuse_beyond_memory
from moe_bias.progress import Meter
from moe_bias.rollout.cache import roomy_cache
from moe_bias.rollout.fixed import FixedRows, goes_into_a_graph

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""From hidden states (B, D), the rows' numbers (B,) and the count of tokens before it to the next token (B,)."""


@dataclass(frozen=True)
class Answer:
    """Generated token ids without the end token, and the end token; None where the limit came before one."""

    token_ids: list[int]
    end: int | None

    @property
    def finished(self) -> bool:
        """Whether an end token came before the limit."""
        return self.end is not None

    @property
    def all_ids(self) -> list[int]:
        """Every generated token, the end token included."""
        return self.token_ids if self.end is None else [*self.token_ids, self.end]


@dataclass(frozen=True)
class TextAnswer:
    """An answer as text, its tokens, end token included (None: a server did not tell), and whether it was not cut."""

    text: str
    tokens: int | None
    finished: bool


@dataclass
class _Rows:
    """The rows still running: their number (B,), cache and attention mask (B, L)."""

    model: nn.Module
    number: Tensor
    cache: Cache
    mask: Tensor

    def keep(self, alive_B: Tensor) -> Tensor:
        """Drops the others, and returns the order of those that stay: the last take the places that come free."""
        kept = alive_B.nonzero().squeeze(-1)
        order = torch.arange(len(kept), device=kept.device)
        order[~alive_B[: len(kept)]] = kept[kept >= len(kept)]
        self.number, self.mask = self.number[order], self.mask[order]
        self.cache.batch_select_indices(order)
        return order

    def next(self, token_B: Tensor) -> Tensor:
        """Hidden states (B, D) after the next token of each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        return _run(self.model, token_B[:, None], self.mask, self.mask.sum(-1, keepdim=True) - 1, self.cache)


@torch.inference_mode()
def answer_batch(
    model: nn.Module,
    prompts: Sequence[list[int]],
    copies: int,
    choose: Choose,
    *,
    stop_ids: Sequence[int],
    limit: int,
    bar: Meter,
) -> list[Answer]:
    """`copies` answers to each prompt: row i answers prompt `i // copies`. The bar counts answers."""
    rows, hidden_BD = _prefill(model, prompts, copies, limit)
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=hidden_BD.device)
    written: list[list[int]] = [[] for _ in range(len(prompts) * copies)]
    ends: list[int | None] = [None] * len(written)
    for step in range(limit):
        token_B = choose(hidden_BD, rows.number, step)
        ended_B = torch.isin(token_B, stops)
        for number, token, ended in torch.stack([rows.number, token_B, ended_B]).T.tolist():
            if ended:
                ends[number] = token
            else:
                written[number].append(token)
        if ended_B.any():
            bar.advance(int(ended_B.sum()))
            token_B = token_B[rows.keep(~ended_B)]
        if len(rows.number) == 0 or step == limit - 1:
            break
        hidden_BD = rows.next(token_B)
    bar.advance(len(rows.number))
    return [Answer(ids, end) for ids, end in zip(written, ends, strict=True)]


def _prefill(
    model: nn.Module, prompts: Sequence[list[int]], copies: int, limit: int
) -> tuple[_Rows | FixedRows, Tensor]:
    """Runs the prompts once, left-padded, and repeats cache and hidden state for every copy."""
    device = next(model.parameters()).device
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = roomy_cache()
    hidden_BD = _run(model, input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    tensors = [held for layer in cache.layers for held in vars(layer).values() if isinstance(held, Tensor)]
    held_bytes = copies * sum(held.nbytes for held in tensors)
    refuse_beyond_memory(
        held_bytes,
        f"{len(prompts):,} problems at once with {copies:,} answers each",
        "lower `batch_size`, or the answers of a problem",
    )
    cache.batch_repeat_interleave(copies)
    hidden_BD, mask = hidden_BD.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
    if goes_into_a_graph(model, limit, held_bytes * (length + limit) // length):
        return FixedRows(partial(_run, model), cache, mask, limit), hidden_BD
    return _Rows(model, torch.arange(len(mask), device=device), cache, mask), hidden_BD


def _cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache: transformers 5.24 renames it, and warns at the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _run(model: nn.Module, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
    return hidden_after(model, input_ids, mask, position_ids, cache)[:, -1]


def hidden_after(model: nn.Module, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
    """Hidden states (B, L, D) that the output embedding reads after each of L tokens; the cache grows by them.

    `mask` (B, tokens held and new) is 0 where a row has none.
    """
    with captured_hidden(model) as seen:
        model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{_cache_argument(model): cache},
        )
    return seen[0]
