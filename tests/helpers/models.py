"""Tiny random models of every architecture that the tests run on, and what is put on and around them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CohereConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY, HIDDEN = 97, 16
"""An odd vocabulary, so that nothing works because it is a multiple of something."""
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
    "gpt2": (GPT2Config, {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2}),
    "phi": (PhiConfig, {"tie_word_embeddings": False}),
    "gpt_neox": (GPTNeoXConfig, {"tie_word_embeddings": False}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def tiny_model(name: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random model of one architecture in evaluation mode, always the same one for the same arguments."""
    config_class, own = _ARCHITECTURES[name]
    config = config_class(**{**_SIZES, **own, **changes})
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config).eval()
    for parameter in model.parameters():  # a random model is sure of nothing; spread its logits
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return model


def token_ids(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length) without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(layer: Any, seed: int = 1, scale: float = 1.0) -> None:
    """Gives a fresh layer biases, and a gate and normalisation unlike the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in layer.state_dict().values():
        tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    layer.hidden_scale.abs_().add_(0.1)


@dataclass
class Rows:
    """An output embedding that is a tensor."""

    weight_VD: Tensor

    def __call__(self, token_M):
        return self.weight_VD if token_M is None else self.weight_VD[token_M]

    def state(self):
        return ()


def model_with(eos_token_id, vocab_size=12):
    generation_config = GenerationConfig(eos_token_id=eos_token_id)
    return SimpleNamespace(config=LlamaConfig(vocab_size=vocab_size), generation_config=generation_config)


def word_tokenizer():
    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}, "[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>")
