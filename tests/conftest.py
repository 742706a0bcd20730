"""Shared fixtures: tiny random models of every architecture that the tests run on, and no network."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

settings.register_profile("ci", derandomize=True)
"""A change is judged by its own examples; new ones are drawn where someone can look at them."""
if os.environ.get("CI"):
    settings.load_profile("ci")

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


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, Debian's package; a test that asks for it is marked `browser`."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return tiny_model
