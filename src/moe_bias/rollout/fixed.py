"""Rows that decode in places that do not move, so that a GPU replays the step as one graph.

A step of a small model is a thousand small kernels, and launching them takes far longer than running them. Captured
as a CUDA graph they are launched at once. A graph writes to the same memory each time: keys and values have places
for all tokens up to the limit (transformers' `StaticLayer`), the mask says which of them hold something, and rows
that are finished go on unread, until half are and the others move into a smaller graph.

Shapes: B rows, L tokens there is room for, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

Forward = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
"""From token ids (B, 1), mask (B, 1, 1, L), positions (B, 1) and a cache, which grows, to hidden states (B, D)."""
SMALLEST = 16
"""Rows below which a smaller graph is no faster."""
_WARM_UPS = 2
"""Steps before a capture, in which libraries choose their kernels and take their memory."""
WORTH_A_GRAPH = 16
"""Tokens of an answer from which capturing a graph pays."""
_SHARE = 3
"""Places may take a third of the memory that is free: as rows become fewer, half of them are there twice."""


def goes_into_a_graph(model: nn.Module, limit: int, room_bytes: int) -> bool:
    """Whether answers of `limit` tokens are worth a graph, and a step is the same kernels whatever the tokens.

    That is known of plain weights on one GPU with attention by PyTorch's own kernel to all tokens before. `room_bytes`
    are those of places for all tokens; where they are too many, memory has to grow with the answers.
    """
    config: Any = model.config
    text = config.get_text_config()
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop()
    return (
        limit >= WORTH_A_GRAPH
        and not devices
        and device.type == "cuda"
        and attends_to_all(text)
        and config._attn_implementation == "sdpa"
        and not getattr(model, "is_quantized", False)
        and _SHARE * room_bytes <= _free_bytes(device)
    )


def _free_bytes(device: torch.device) -> int:
    """Of a GPU, with what PyTorch holds of it and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def attends_to_all(config: Any) -> bool:
    """Whether each layer attends to all tokens before, by a mask and positions alone."""
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return types == {"full_attention"} and not any(
        getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "alibi")
    )


class FixedRows:
    """Rows after their prompts. `number` (B,) are those still running, by their place among all rows.

    On a CPU a step is the same computation without a graph, as its reference.
    """

    number: Tensor
    _layers: list[_FixedLayer]
    _place: Tensor
    _mask: Tensor
    _position: Tensor
    _token: Tensor
    _held: Tensor
    _hidden: Tensor
    _graph: torch.cuda.CUDAGraph | None

    def __init__(self, forward: Forward, cache: Cache, mask_BL: Tensor, limit: int) -> None:
        """`mask` is of the prompts, which `cache` holds; `limit` tokens may follow."""
        self._forward = forward
        self.number = torch.arange(len(mask_BL), device=mask_BL.device)
        room = mask_BL.new_zeros(len(mask_BL), mask_BL.shape[-1] + limit, dtype=torch.bool)
        room[:, : mask_BL.shape[-1]] = mask_BL.bool()
        held = torch.tensor(mask_BL.shape[-1], device=mask_BL.device)
        layers = [_FixedLayer(layer.keys, layer.values, held, room.shape[-1]) for layer in cache.layers]
        self._lay_out(layers, room, mask_BL.sum(-1), held)

    def keep(self, alive_B: Tensor) -> Tensor:
        """Drops the others, and returns the order of those that stay. Dropped rows are unread until half of all are."""
        kept = alive_B.nonzero().squeeze(-1)
        self.number, self._place = self.number[kept], self._place[kept]
        rows = len(self._token)
        if 0 < len(self._place) <= rows // 2 and rows > SMALLEST:
            place, layers = self._place, self._layers
            held = layers[0].cumulative_length.clone()
            chosen = [_FixedLayer(one.keys[place], one.values[place], held, one.max_cache_len) for one in layers]
            self._lay_out(chosen, self._mask[place, 0, 0], self._position[place, 0], held)
        return kept

    def next(self, token_B: Tensor) -> Tensor:
        """Hidden states (B, D) after the next token of each running row."""
        self._token[self._place, 0] = token_B
        if self._graph is None:
            self._hidden = self._step()
        else:
            self._graph.replay()
        return self._hidden[self._place]

    def _lay_out(self, layers: list[_FixedLayer], mask_BL: Tensor, position_B: Tensor, held: Tensor) -> None:
        self._layers = layers
        self._place = torch.arange(len(mask_BL), device=mask_BL.device)
        self._mask, self._position = mask_BL[:, None, None].clone(), position_B[:, None].clone()
        self._token, self._held = torch.zeros_like(self._position), held.clone()[None]
        self._graph = None
        if mask_BL.is_cuda:
            with torch.cuda.device(mask_BL.device):
                self._graph, self._hidden = self._captured()

    def _step(self) -> Tensor:
        self._mask.index_fill_(-1, self._held, True)
        hidden_BD = self._forward(self._token, self._mask, self._position, Cache(layers=list(self._layers)))
        self._position += 1
        self._held += 1
        return hidden_BD

    def _captured(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step as a graph. Steps before it leave no trace: what they write, the first replays write again."""
        counters = [self._mask, self._position, self._held, *(layer.cumulative_length for layer in self._layers)]
        before = [counter.clone() for counter in counters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step()
                for counter, value in zip(counters, before, strict=True):
                    counter.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden_BD = self._step()
        return graph, hidden_BD


class _FixedLayer(StaticLayer):
    """A layer that holds these keys and values (B, heads, tokens, head size), with room for `length` tokens."""

    def __init__(self, keys: Tensor, values: Tensor, held: Tensor, length: int) -> None:
        super().__init__(length)
        self.lazy_initialization(keys, values)
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : values.shape[2]] = values
        self.cumulative_length = held.clone()
