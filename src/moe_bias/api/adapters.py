"""Layers as saved adapters, and answers under them."""

from __future__ import annotations

from pathlib import Path

from moe_bias.adapter import save_layer
from moe_bias.adapter.saved import refuse_overwriting
from moe_bias.api.arguments import Layers, named, parts_of, refuse_other_base, refuse_other_layer
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.progress import meter
from moe_bias.rollout.answers import AnswerChoices, sampled_answers
from moe_bias.rollout.policy import summed_policy
from moe_bias.tasks.conversations import Conversation, answer_ends, encode_prompt
from moe_bias.training.problems import saved_layer


def save(layer: MoEBiasLayer, folder: str | Path, base: Frozen) -> None:
    """Saves a layer as an adapter, which `PeftModel.from_pretrained`, vLLM with this plugin and `load_layer` read.

    Raises UserError where the folder holds an adapter already or is a file, or the layer is of another model.
    """
    refuse_other_base(base)
    refuse_other_layer(layer, base)
    refuse_overwriting(Path(folder))
    save_layer(layer, folder, base.model)


def load_layer(source: str | Path, base: Frozen) -> MoEBiasLayer:
    """The layer of an adapter, a folder or a Hub id, on the model's device.

    Raises UserError where there is none, or it is damaged, of another method or made for another model.
    """
    refuse_other_base(base)
    return saved_layer(str(source), base.head).layer


def generate(
    base: Frozen,
    prompt: str,
    layer: Layers | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
) -> str:
    """The answer to a prompt under a layer, under several, or of the frozen model itself.

    `layer` may be a list of layers, whose biases add, or a mapping of layers to the strengths that they are applied
    with in the place of their own: `{formal: 0.7, medical: 1.0}`.

    `temperature` 0 is greedy. With `chat` the prompt is a user's turn in the model's chat template, else a text to be
    continued. Raises UserError where the tokenizer has no such template, on a prompt that is no text, on a layer of
    another model or one that is there twice, and on a strength that is no finite number.
    """
    refuse_other_base(base)
    if not isinstance(prompt, str):
        raise UserError(f"`prompt` is {named(prompt)}; give one text, and call again for the next")
    parts = parts_of(layer, base)
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` is {max_new_tokens}; give at least 1")
    if not temperature >= 0:
        raise UserError(f"`temperature` is {temperature}; give 0, which is greedy, or more")
    if chat and not base.tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; pass chat=False for plain text")
    turn = {"role": "user", "content": prompt}
    ids = encode_prompt(Conversation((turn,), "", is_chat=chat), base.tokenizer)
    choices = AnswerChoices(1, temperature, 1.0, max_new_tokens, answer_ends(base.model, base.tokenizer, chat))
    policies = [summed_policy(parts, base.head.transform)]
    with meter("answering", 1, "answers", visible=False) as bar:
        answers = sampled_answers(base.model, base.head, [ids], policies, choices, [seed], bar)
    return str(base.tokenizer.decode(answers[0][0][0].token_ids, skip_special_tokens=True))
