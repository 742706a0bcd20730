"""Answers token by token: one batch, prompts computed once, finished rows dropped.

Rows of a batch share a cache; each prompt may have several rows. What chooses the next token is the
caller's: the largest logit of one of several policies, or a sample that is kept with its scalars.

Shapes: B rows still running, L tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moe_bias.backbone import captured_hidden
from moe_bias.limits import refuse_beyond_memory
from moe_bias.progress import Meter
from moe_bias.rollout.cache import roomy_cache

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
    """The rows still running: their number, cache, attention mask (B, L) and next token (B,)."""

    number: Tensor
    cache: Cache
    mask: Tensor
    token: Tensor

    def keep(self, alive_B: Tensor) -> None:
        """Drops the others; the last rows take the places that come free, so that few are moved."""
        kept = alive_B.nonzero().squeeze(-1)
        order = torch.arange(len(kept), device=kept.device)
        order[~alive_B[: len(kept)]] = kept[kept >= len(kept)]
        self.number, self.mask, self.token = self.number[order], self.mask[order], self.token[order]
        self.cache.batch_select_indices(order)


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
    rows, hidden_BD = _prefill(model, prompts, copies)
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=hidden_BD.device)
    written: list[list[int]] = [[] for _ in range(len(prompts) * copies)]
    ends: list[int | None] = [None] * len(written)
    for step in range(limit):
        rows.token = choose(hidden_BD, rows.number, step)
        ended_B = torch.isin(rows.token, stops)
        for number, token, ended in torch.stack([rows.number, rows.token, ended_B]).T.tolist():
            if ended:
                ends[number] = token
            else:
                written[number].append(token)
        if ended_B.any():
            bar.advance(int(ended_B.sum()))
            rows.keep(~ended_B)
        if len(rows.number) == 0 or step == limit - 1:
            break
        hidden_BD = _decode(model, rows)
    bar.advance(len(rows.number))
    return [Answer(ids, end) for ids, end in zip(written, ends, strict=True)]


def _prefill(model: nn.Module, prompts: Sequence[list[int]], copies: int) -> tuple[_Rows, Tensor]:
    """Runs the prompts once, left-padded, and repeats cache and hidden state for every copy."""
    device = next(model.parameters()).device
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = roomy_cache()
    hidden_BD = _run(model, input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    tensors = [held for layer in cache.layers for held in vars(layer).values() if isinstance(held, Tensor)]
    refuse_beyond_memory(
        copies * sum(held.nbytes for held in tensors),
        f"{len(prompts):,} problems at once with {copies:,} answers each",
        "lower `batch_size`, or the answers of a problem",
    )
    cache.batch_repeat_interleave(copies)
    number = torch.arange(len(prompts) * copies, device=device)
    return _Rows(number, cache, mask.repeat_interleave(copies, 0), number), hidden_BD.repeat_interleave(copies, 0)


def _decode(model: nn.Module, rows: _Rows) -> Tensor:
    rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.mask), 1)], dim=-1)
    return _run(model, rows.token[:, None], rows.mask, rows.mask.sum(-1, keepdim=True) - 1, rows.cache)


def _cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache: transformers 5.24 renames it, and warns at the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _run(model: nn.Module, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
    """The last hidden states (B, D) that the output embedding reads; the cache grows by the tokens."""
    with captured_hidden(model) as seen:
        model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{_cache_argument(model): cache},
        )
    return seen[0][:, -1]
