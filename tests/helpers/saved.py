"""Folders as a user has them: a tiny model, an adapter of it, rows."""

import json
from pathlib import Path

from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.models import VOCABULARY, randomise, tiny_model
from moe_bias import MoEBiasConfig, find_adapter_head

CHAT_TEMPLATE = "{% for message in messages %}w3 {{ message['content'] }} {% endfor %}"
SUPPORT = [3, 5, 8, 40, 96]


def save_model(
    folder: Path, chat_template: str | None = CHAT_TEMPLATE, architecture: str = "llama", word: str = "w", **sizes
) -> str:
    """A tiny model and a tokenizer whose token t is the word `wt`, as one folder."""
    words = Tokenizer(models.WordLevel({f"{word}{token}": token for token in range(VOCABULARY)}, unk_token=f"{word}0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"{word}2", pad_token=f"{word}0")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    tiny_model(architecture, **sizes).save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base_model: str, **changes) -> str:
    """An adapter with random weights on the tiny model."""
    model = tiny_model("llama")
    model.name_or_path = base_model
    adapted = get_peft_model(
        model, MoEBiasConfig(**{"experts": "free", "num_experts": 3, "support": SUPPORT, **changes})
    )
    randomise(find_adapter_head(adapted).active_layer, scale=5.0)
    adapted.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path) -> None:
    rows = [{"question": f"w{n} w6", "answer": "w7"} for n in range(5, 9)]
    path.write_text("\n".join(map(json.dumps, rows)))
