"""A tiny model as a GGUF file, written by the package gguf as llama.cpp writes them."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quantize

from helpers.models import VOCABULARY, tiny_model

CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path,
    *,
    architecture: str = "qwen2",
    chat_template: str | None = CHAT,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    odd_kind: int | None = None,
    leave_out: str = "",
    values: dict[str, int] | None = None,
    **changes: Any,
) -> Any:
    """Writes the tiny model of helpers.models, and returns it.

    Matrices are written in `kind`, the first tensor in `odd_kind` whatever its bytes are; tensors whose names hold
    `leave_out` are left out; `values` are more numbers of the header.
    """
    model = tiny_model("qwen2", **changes)
    writer = GGUFWriter(path, architecture)
    _describe(writer, model.config)
    for key, value in (values or {}).items():
        writer.add_uint32(key, value)
    _add_tokenizer(writer, chat_template)
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if not leave_out or leave_out not in name:
            content = tensor.numpy()
            raw = quantize(content, kind) if tensor.ndim > 1 and kind != GGMLQuantizationType.F32 else content
            own = kind if raw is not content else None
            if odd_kind is not None and number == 0:
                own = GGMLQuantizationType(odd_kind)
                raw = np.zeros((1, GGML_QUANT_SIZES[own][1]), np.uint8)
            writer.add_tensor(_name(name), raw, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _describe(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(writer: GGUFWriter, chat_template: str | None) -> None:
    letters = [chr(number) for number in range(33, 33 + VOCABULARY - 6)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<s>", "</s>", *letters, "ab", "\u0120", "\u010a"])
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{ending}"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{_INNER[inner]}.{ending}"
