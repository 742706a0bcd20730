"""The output embedding of a model that vLLM serves: its rows, which adapters' experts are made through.

vLLM pads it with rows of no token, may have it quantised, and spreads it over the ranks of tensor
parallelism. It is read when the model has been loaded, which all ranks do together: an adapter is loaded
by each rank for itself.

Shapes: V vocabulary, D hidden, M tokens, S rows of one rank's part with its padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from moe_bias.adapter.embedding import embedding_sample
from moe_bias.backbone import OutputRows
from moe_bias.layer import EmbeddingRows, at_least_float32


@dataclass(frozen=True, eq=False)
class ServedEmbedding:
    """The rows of an engine's output embedding, and the sample of them that adapters are told apart by."""

    rows: EmbeddingRows
    sample: Tensor | None


_SERVED: WeakValueDictionary[int, ServedEmbedding] = WeakValueDictionary()
"""By the identity of their engine's config: see `processor_of`."""


def embedding_of(config: VllmConfig) -> ServedEmbedding | None:
    """The output embedding of an engine in this process, once its model has been loaded and as long as it is there."""
    return _SERVED.get(id(config))


def keep_embedding(config: VllmConfig, embedding: ServedEmbedding) -> None:
    """Lets `embedding_of` find it, as long as somebody else holds it."""
    _SERVED[id(config)] = embedding


def read_embedding(lm_head: Any, model_config: ModelConfig) -> ServedEmbedding:
    """What a model calls its `LogitsProcessor` with. All ranks call this together."""
    sizes = model_config.get_hidden_size(), model_config.get_vocab_size()
    if lm_head.tp_size == 1:
        rows: EmbeddingRows = OutputRows(_Part(lm_head, sizes[1], model_config))
    else:
        rows = _gathered(lm_head, model_config)
    return ServedEmbedding(rows, embedding_sample(rows, *sizes))


def _gathered(lm_head: Any, model_config: ModelConfig) -> EmbeddingRows:
    """The rows of all ranks. Each rank keeps all of them, V D numbers of the model's type, in the machine's memory.

    That is 1.2 GB a rank for V = 152,000 and D = 4,096 in half precision, and while they are gathered as much on the
    device, where the key-value cache is yet to come. For this no adapter makes ranks wait for each other.
    """
    part = _Part(lm_head, lm_head.num_embeddings_per_partition, model_config)
    # A rank's rows come from numbers of this type, so nothing is lost.
    part_SD = OutputRows(part)(None).to(model_config.dtype)
    # Padding stands at the end of all rows: there are no tokens beyond the model's own without LoRA.
    weight_VD = tensor_model_parallel_all_gather(part_SD, dim=0)[: model_config.get_vocab_size()]
    return HeldRows(weight_VD.cpu())


class HeldRows:
    """Rows (V, D) that are held as one tensor: see `EmbeddingRows`."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD

    def __call__(self, token_M: Tensor | None) -> Tensor:
        """See `EmbeddingRows`."""
        weight_VD = self._weight_VD
        return at_least_float32(weight_VD if token_M is None else weight_VD[token_M.to(weight_VD.device)])

    def state(self) -> tuple[object, ...]:
        """A served model does not change."""
        return ()


class _Part(nn.Module):
    """The first rows of vLLM's output embedding on this rank, as the linear layer that `OutputRows` reads."""

    computes: Tensor

    def __init__(self, lm_head: Any, rows: int, model_config: ModelConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = model_config.get_hidden_size(), rows
        # The one tensor of this module, so that it tells where and in which type products are computed: a quantised
        # embedding's own tensors tell the type that it is packed in.
        device = next(tensor.device for tensor in (*lm_head.parameters(), *lm_head.buffers()))
        self.register_buffer("computes", torch.empty(0, dtype=model_config.dtype, device=device))
        self._lm_head = (lm_head,)

    @property
    def weight(self) -> Tensor | None:
        """(rows, D), where it is there as numbers."""
        (lm_head,) = self._lm_head
        plain = isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        return cast(Tensor, lm_head.weight)[: self.out_features] if plain else None

    def forward(self, hidden: Tensor) -> Tensor:
        """The product (..., rows) without the embedding's bias, as vLLM computes it."""
        (lm_head,) = self._lm_head
        product: Tensor = lm_head.quant_method.apply(lm_head, hidden, bias=None)
        return product[..., : self.out_features]
