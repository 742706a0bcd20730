"""What a feature store must fit: the model, its output embedding, and its tokenizer, as hashes.

Weights are hashed by their values in float32, so that a bfloat16 checkpoint is the same model
whether it was loaded in bfloat16 or in float32. The output embedding is hashed whole: training
multiplies stored hidden states with it. Of every other parameter the name, the shape and evenly
spaced values are hashed, which another training run would have moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedTokenizerBase

from moe_bias.backbone import Head
from moe_bias.tasks.conversations import Corpus

SAMPLED_VALUES = 64
"""Values of each parameter that enter the backbone's hash, at least; parameters with fewer enter whole."""
ROWS_AT_ONCE = 4096
"""Rows of the output embedding that are held in float32 while it is hashed."""
_VOLATILE = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache"})
"""Config keys that say how a model was loaded, not what it computes."""


Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Width = Annotated[int, Field(ge=1, le=2**24)]
"""Of a hidden state or a vocabulary; none is near the bound, and a list of so many ids can still be made."""


class ModelFacts(BaseModel):
    """The model a store is made with. `name` and `revision` tell a reader; the other fields must fit.

    `backbone`, `head` and `tokenizer` are hashes; `compute_dtype` is the type of the output
    embedding's weights, which a reader may load in another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    revision: str | None
    backbone: str
    head: str
    head_scale: float
    head_cap: float | None
    hidden_size: Width
    vocab_size: Width
    tokenizer: str
    compute_dtype: str


def model_facts(model: Any, head: Head, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
    """The facts of a model as it is loaded; reads every weight of the output embedding once."""
    return ModelFacts(
        name=str(getattr(model, "name_or_path", "")),
        revision=getattr(model.config, "_commit_hash", None),
        backbone=backbone_hash(model),
        head=head_hash(head.module),
        head_scale=head.transform.scale,
        head_cap=head.transform.cap,
        hidden_size=head.hidden_size,
        vocab_size=head.vocab_size,
        tokenizer=tokenizer_hash(tokenizer),
        compute_dtype=str(head.dtype).removeprefix("torch."),
    )


@torch.no_grad()
def backbone_hash(model: Any) -> str:
    """SHA-256 of the config and of evenly spaced values of every parameter."""
    digest = hashlib.sha256(_json_bytes(_lasting(model.config.to_diff_dict())))
    for name, parameter in sorted(model.named_parameters()):
        digest.update(_json_bytes([name, list(parameter.shape)]))
        for part in _plain_parts(parameter):
            digest.update(_bytes_of(part.flatten()[:: max(part.numel() // SAMPLED_VALUES, 1)]))
    return digest.hexdigest()


@torch.no_grad()
def head_hash(module: nn.Module) -> str:
    """SHA-256 of every weight of the output embedding, packed ones as they are kept.

    Take it before the first product: bitsandbytes then packs weights of 4 bits anew on a CPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(_json_bytes([name, list(tensor.shape)]))
        for part in _plain_parts(tensor):
            for rows in part.split(ROWS_AT_ONCE) if part.ndim else [part]:
                digest.update(_bytes_of(rows))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into ids, and of the chat template.

    Padding and truncation are left out: a mere call changes them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    kept = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(_json_bytes([kept, tokenizer.chat_template])).hexdigest()


def corpus_hash(corpus: Corpus) -> str:
    """SHA-256 of every example's row, prompt and completion ids, in order."""
    digest = hashlib.sha256()
    for row, example in zip(corpus.rows, corpus.examples, strict=True):
        numbers = [row, len(example.prompt_ids), *example.prompt_ids, *example.completion_ids]
        digest.update(torch.tensor([len(numbers), *numbers]).numpy().tobytes())
    return digest.hexdigest()


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _lasting(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _VOLATILE
    }


def _plain_parts(tensor: Any) -> Iterator[Tensor]:
    """The tensor, or those that it is made of where it is packed: torchao's know neither `flatten` nor `split`."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor


def _bytes_of(tensor: Tensor) -> bytes:
    """The values, floating-point ones in float32; packed integers as they are."""
    values = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    content: bytes = values.cpu().contiguous().numpy().tobytes()
    return content


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
