"""`moe-bias generate`: an answer as it is written, of the model, the adapted model, or both."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from rich.rule import Rule
from transformers import PreTrainedTokenizerBase, TextStreamer

from moe_bias.adapter.saved import adapter_folder, read_saved
from moe_bias.commands.looking_settings import GenerateSettings
from moe_bias.frozen import load_model
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.progress import text_console
from moe_bias.tasks.conversations import Conversation, answer_ends, encode_prompt


def run(settings: GenerateSettings) -> None:
    """Streams the answers to standard output.

    Raises UserError where an option needs an adapter or a chat template that is not there.
    """
    _check(settings)
    model, tokenizer = load_model(settings)
    prompt_ids = _prompt_ids(settings, tokenizer)
    if settings.adapter is None:
        _answer(model, tokenizer, prompt_ids, settings)
        return
    adapted = load_adapter(model, settings.adapter, settings.strength)
    if settings.compare:
        _answer(adapted, tokenizer, prompt_ids, settings, "base", adapted.disable_adapter())
        _answer(adapted, tokenizer, prompt_ids, settings, "adapted")
    else:
        _answer(adapted, tokenizer, prompt_ids, settings)


def load_adapter(model: Any, name: str, strength: float | None) -> Any:
    """The model with a saved adapter on it, its strength replaced unless that is None.

    Raises UserError where there is no such adapter or it is of another method, ValueError where it
    does not fit the model.
    """
    read_saved(name)  # what is wrong with the files is told before PEFT's loader trips over it
    adapted = PeftModel.from_pretrained(model, str(adapter_folder(name))).eval()
    layers = [module for module in adapted.modules() if isinstance(module, MoEBiasLayer)]
    assert layers, "PEFT loaded an adapter of this method and made no layer for it"
    for layer in layers:
        layer.strength = layer.strength if strength is None else strength
    return adapted


def _check(settings: GenerateSettings) -> None:
    for option, given in (("--compare", settings.compare), ("--strength", settings.strength is not None)):
        if given and settings.adapter is None:
            raise UserError(f"{option} needs an adapter; name one with --adapter")


def _prompt_ids(settings: GenerateSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if settings.chat and not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {settings.model!r} has no chat template; pass --no-chat for plain text")
    turn = {"role": "user", "content": settings.prompt}
    return encode_prompt(Conversation((turn,), "", is_chat=settings.chat), tokenizer)


@torch.inference_mode()
def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    settings: GenerateSettings,
    heading: str = "",
    mode: AbstractContextManager[Any] | None = None,
) -> None:
    if heading:
        text_console().print(Rule(heading))
    torch.manual_seed(settings.seed)
    input_ids = torch.tensor([prompt_ids], device=model.device)
    stop_ids = answer_ends(model, tokenizer, settings.chat)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
    with mode or nullcontext():
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=stop_ids or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
