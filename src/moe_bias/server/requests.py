"""A request of OpenAI's protocol as what the engine is asked, checked before anything is computed.

Fields that the protocol has and this server does not are ignored where they change no answer, such as `user`; those
that would change one are refused by name. Our own are `moe_bias` and `moe_bias_strength` (see `serving.asked`), at the
top or within `vllm_xargs`, as vLLM's server takes them, and `moe_bias_numbers`, which asks for each token's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, ValidationError
from transformers import PreTrainedTokenizerBase

from moe_bias.limits import LONGEST_ANSWER
from moe_bias.mistakes import UserError, first_mistake, shown
from moe_bias.server.answer import Asked
from moe_bias.server.engine import Engine
from moe_bias.serving.asked import NAME, STRENGTH, Strengths, asked_adapters
from moe_bias.tasks.conversations import Conversation, encode_prompt

LARGEST_STRENGTH = 100.0
"""Logits that adapters move further are no numbers any more."""
_SEEDS = 2**63
_OTHER_SETTINGS: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
}
"""Fields that would change an answer and are not known here, and the values at which they do not."""
Text = Annotated[str, Field(min_length=1)]


class RefusedError(UserError):
    """A request that cannot be answered; `status`, `field` and `code` are those of OpenAI's errors."""

    def __init__(self, sentence: str, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(sentence)
        self.field, self.status, self.code = field, status, code


def _joined(content: object) -> object:
    """A message's text in parts, as one."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError("parts of a message are text here")
    return "".join(str(part.get("text", "")) for part in content)


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class _Turn(BaseModel):
    """A message; fields that it has besides are left out, and what they say with them."""

    role: Text
    content: Annotated[str, BeforeValidator(_joined)]


class _StreamOptions(BaseModel):
    include_usage: StrictBool = False


class _Body(BaseModel):
    """The fields that are read, null standing for the default, as clients send it."""

    model_config = ConfigDict(allow_inf_nan=False)
    model: Text
    messages: list[_Turn] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2, strict=True)
    top_p: float | None = Field(None, gt=0, le=1, strict=True)
    max_tokens: StrictInt | None = Field(None, ge=1, le=LONGEST_ANSWER)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=LONGEST_ANSWER)
    seed: StrictInt | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stop: Annotated[list[Text] | None, BeforeValidator(_listed)] = Field(None, max_length=16)
    stream: StrictBool | None = None
    stream_options: _StreamOptions | None = None
    moe_bias_numbers: StrictBool | None = None


@dataclass(frozen=True)
class ChatRequest:
    """What the engine is asked, and how the answer is told. `model` is the name as it was given."""

    asked: Asked
    model: str
    is_streamed: bool
    tells_usage: bool


def read_chat(body: object, engine: Engine, name: str, limit: int) -> ChatRequest:
    """The request. `name` is what clients call the model, `limit` the tokens of an answer where it names none.

    Reads the adapters' files where they have changed. Raises RefusedError on a request that cannot be answered.
    """
    if not isinstance(body, dict):
        raise RefusedError(f"the body is no JSON object but {shown(body)}")
    _refuse_other_settings(body)
    try:
        given = _Body.model_validate(body)
    except ValidationError as error:
        first = first_mistake(error)
        reason = "it is required" if first.kind == "missing" else f"{first.reason}, not {shown(first.value)}"
        raise RefusedError(f"{first.field}: {reason}", first.place[0]) from error
    strengths = _adapters(body, given.model, engine, name)
    versions = {adapter: _version(engine, adapter) for adapter in strengths}
    prompt = _prompt(given.messages, engine.base.tokenizer)
    asked = Asked(
        prompt,
        versions,
        {adapter: strength for adapter, strength in strengths.items() if strength is not None},
        1.0 if given.temperature is None else float(given.temperature),
        1.0 if given.top_p is None else float(given.top_p),
        given.seed,
        _room(len(prompt), given.max_completion_tokens or given.max_tokens or limit, engine.context),
        given.stop or [],
        bool(given.moe_bias_numbers),
    )
    tells_usage = given.stream_options is not None and given.stream_options.include_usage
    return ChatRequest(asked, given.model, bool(given.stream), tells_usage)


def checked_strength(value: object, field: str) -> float:
    """A strength that a client gave. Raises RefusedError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_STRENGTH:
        raise RefusedError(f"{field}: a strength is a number from -100 to 100, not {shown(value)}", field)
    return float(value)


def _refuse_other_settings(body: Mapping[str, Any]) -> None:
    for field, harmless in _OTHER_SETTINGS.items():
        value = body.get(field)
        if value is not None and value not in harmless:
            raise RefusedError(f"{field} is {shown(value)}, which this server cannot do; leave it out", field)


def _adapters(body: Mapping[str, Any], model: str, engine: Engine, name: str) -> Strengths:
    """The adapters that are asked for, by the model's name or by fields of our own."""
    if model != name and not model.startswith(f"{name}:"):
        raise RefusedError(
            f"there is no model {shown(model)} on this server; it has {name!r}, and {name}:ADAPTER for an adapter",
            "model",
            404,
            "model_not_found",
        )
    of_name = model.removeprefix(name).removeprefix(":")
    extra = body.get("vllm_xargs")
    given = {**(extra if isinstance(extra, dict) else {}), **body}
    asked, strength = given.get(NAME), given.get(STRENGTH)
    if of_name and asked not in (None, of_name):
        raise RefusedError(
            f"model {shown(model)} asks for the adapter {of_name!r} and {NAME} for {shown(asked)}; give one", NAME
        )
    asked = of_name or asked
    if asked is None:
        if strength is not None:
            raise RefusedError(f"{STRENGTH} is {shown(strength)} without an adapter; name one in {NAME}", STRENGTH)
        return {}
    try:
        found = asked_adapters(asked, strength, lambda: engine.adapters)
    except UserError as error:
        raise RefusedError(str(error), NAME) from error
    for value in found.values():
        if value is not None:
            checked_strength(value, STRENGTH if strength is not None else NAME)
    return found


def _version(engine: Engine, adapter: str) -> Path:
    try:
        return engine.version(adapter)
    except UserError as error:
        is_there = adapter in engine.adapters
        status, code = (400, None) if is_there else (404, "model_not_found")
        raise RefusedError(str(error), "model", status, code) from error


def _prompt(turns: Sequence[_Turn], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        prompt = encode_prompt(Conversation(tuple(turn.model_dump() for turn in turns), ""), tokenizer)
    except UserError as error:
        raise RefusedError(str(error), "messages") from error
    if not prompt:
        raise RefusedError("the messages make a prompt without tokens", "messages")
    return prompt


def _room(prompt: int, limit: int, context: int | None) -> int:
    if context is None:
        return limit
    if prompt >= context:
        raise RefusedError(
            f"the messages are {prompt:,} tokens, and the model reads {context:,} with the answer; leave some out",
            "messages",
            code="context_length_exceeded",
        )
    return min(limit, context - prompt)
