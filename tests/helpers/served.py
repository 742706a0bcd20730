"""A tiny random model with a tokenizer of characters, adapters of it, and vLLM's engine on them, in this process."""

import os
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.models import randomise
from moe_bias.adapter.files import save_layer
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer

WITHOUT_VLLM = "vLLM is not installed here; it has an environment of its own, see CONTRIBUTING.md"
SECOND_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
CHARACTERS = [c for c in string.printable if c not in "\r\x0b\x0c"]
VOCABULARY, HIDDEN, LENGTH = len(CHARACTERS) + 2, 64, 256
"""An odd vocabulary, which vLLM pads."""
ADAPTERS = {
    "routed": LayerConfig(experts="free", num_experts=4, top_k=2, support=tuple(range(1, 80, 2))),
    "static": LayerConfig(experts="free", num_experts=1, top_k=1, entropy_gate=False),
    "whole": LayerConfig(experts="free", num_experts=3, top_k=3, strength=0.5),
    "linear": LayerConfig(experts="linear", expert_rank=2, num_experts=3, support=tuple(range(1, 80, 2))),
    "far": LayerConfig(
        experts="directions", free_entries=True, num_experts=3, support=tuple(range(2, 60)), reach="vocabulary"
    ),
}


def write_tokenizer(folder: Path) -> None:
    """One token a character."""
    vocabulary = {character: number for number, character in enumerate(["<unk>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


def write_model(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in model.parameters():  # a random model is sure of nothing; spread its logits
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@torch.no_grad()
def read_at_scale(layer: MoEBiasLayer) -> None:
    """Linear experts that read as a fresh layer's do: biases of thousands would show float32's rounding alone."""
    if layer.reads is not None:
        layer.reads.div_(layer.hidden_size**0.5)


def write_adapter(folder: Path, model: Any, config: LayerConfig, seed: int = 1, **changes: Any) -> None:
    layer = MoEBiasLayer(config, model.config.hidden_size, model.config.vocab_size)
    randomise(layer, seed=seed, **changes)
    read_at_scale(layer)
    save_layer(layer, folder, model)


@contextmanager
def running(model: Path, adapters: Path | None, **choices: Any) -> Iterator[Any]:
    """An engine, of which a process has one at a time; `choices` are vLLM's own."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with pytest.MonkeyPatch.context() as patch:
        if adapters is not None:
            patch.setenv("MOE_BIAS_ADAPTERS", str(adapters))
        defaults = {
            "dtype": "float32",
            "max_model_len": LENGTH,
            "kv_cache_memory_bytes": 2**24,
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "disable_log_stats": False,
            "max_logprobs": -1,
        }
        if SECOND_RUNNER:  # which takes them before the logits move otherwise
            defaults["logprobs_mode"] = "processed_logprobs"
        engine = LLM(str(model), **{**defaults, **choices})
        assert engine.llm_engine.vllm_config.use_v2_model_runner == SECOND_RUNNER
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown()
            del engine
            cleanup_dist_env_and_memory()
