"""What the benchmarks of the update work on: a frozen model, random tokens, and their hidden states.

The model is a named one, or a random one of given sizes, so that a size can be measured whose weights
are not at hand. Hidden states are the model's own. Where a corpus is longer than is worth extracting,
those of its first tokens are repeated: the cost of an update does not depend on their values.

Shapes: T tokens, D hidden, V vocabulary, M support.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moe_bias.backbone import Head, find_head
from moe_bias.config import ModelConfig
from moe_bias.features.extract import Features, HiddenTokens, run_backbone, with_scalars
from moe_bias.features.source import on_device
from moe_bias.frozen import load_model
from moe_bias.mistakes import UserError
from moe_bias.tasks.conversations import Example

LENGTH = 128
"""Tokens of a sequence that goes through the backbone."""
HEAD_DIMENSION = 64


@dataclass(frozen=True)
class Corpus:
    """The output embedding, and hidden states of some tokens that a corpus of any length repeats."""

    head: Head
    hidden: HiddenTokens
    _features: dict[int, Features] = field(default_factory=dict)

    def features(self, support: int, tokens: int) -> Features:
        """Features of a corpus of `tokens` tokens on the device; the support is the first `support` ids."""
        if support not in self._features:
            made = with_scalars(self.head, self.hidden, range(support), f"base distribution, M = {support:,}")
            self._features[support] = on_device(made, self.head.device)
        distinct = self._features[support]
        if tokens <= len(distinct):
            return distinct.at(slice(0, tokens))
        return distinct.at(torch.arange(tokens, device=self.head.device) % len(distinct))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where and in which precision."""
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", metavar="D,V,N", help="a random model: hidden size, vocabulary, about N parameters")


def model_of(options: argparse.Namespace) -> PreTrainedModel:
    """The frozen model that the options name. Raises UserError where there is none."""
    if options.shape is None:
        settings = ModelConfig(model=options.model, device=options.device, dtype=options.dtype)
        return load_model(settings)[0]
    return random_model(options.shape, options.device, options.dtype)


def random_model(shape: str, device: str, dtype: str) -> PreTrainedModel:
    """A Llama of random weights, its layers as many as bring it nearest to N parameters.

    'auto' as a type is bfloat16 on an accelerator. Raises UserError on a shape that is no shape.
    """
    config = shaped_config(shape)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def shaped_config(shape: str) -> LlamaConfig:
    """The config of `random_model`. Raises UserError on a shape that is no shape."""
    try:
        hidden, vocabulary, parameters = (int(part) for part in shape.split(","))
    except ValueError as error:
        raise UserError(f"--shape {shape!r} is not of the form D,V,N, as 4096,128256,8000000000 is") from error
    if hidden < HEAD_DIMENSION or hidden % HEAD_DIMENSION or vocabulary < 1:
        raise UserError(f"--shape {shape!r}: the hidden size must be a multiple of {HEAD_DIMENSION}")
    inner = -(-8 * hidden // (3 * HEAD_DIMENSION)) * HEAD_DIMENSION
    of_a_layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    return LlamaConfig(
        hidden_size=hidden,
        vocab_size=vocabulary,
        intermediate_size=inner,
        num_hidden_layers=max(round((parameters - 2 * vocabulary * hidden) / of_a_layer), 1),
        num_attention_heads=hidden // HEAD_DIMENSION,
        num_key_value_heads=hidden // HEAD_DIMENSION,
        tie_word_embeddings=False,
    )


def random_ids(vocabulary: int, tokens: int) -> Tensor:
    """(T,) int64, always the same ones."""
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))


def corpus_of(model: nn.Module, distinct: int) -> Corpus:
    """Runs the backbone over `distinct` random tokens.

    The head is a copy: the model's own may share memory with the file that all its weights are mapped from.
    """
    head = find_head(model)[1]
    rows = random_ids(head.vocab_size, distinct).split(LENGTH)
    # A sequence's first token needs one before it, so that every token of the corpus has a hidden state.
    examples = [Example([0], row.tolist()) for row in rows]
    hidden = run_backbone(model, examples, 8, "hidden states")
    return Corpus(Head(copy.deepcopy(head.module), head.transform), hidden)
