"""Adapters as model names of vLLM's own server: `--middleware moe_bias.serving.names.AdapterNames`.

A request for the model `BASE:ADAPTER` goes on as one for BASE with `vllm_xargs.moe_bias = ADAPTER`, so that any
client of OpenAI's protocol can choose an adapter, or several by `BASE:ONE+OTHER`; whether there are such adapters
is decided where every request is checked. A mapping in `vllm_xargs.moe_bias`, which vLLM takes none of, goes on
as its JSON text. `/v1/models` lists each adapter of the folder as a model whose parent is BASE. All else
passes as it is, and no answer to a prompt is held up.

vLLM puts such a class outside its check of API keys, so the list is made from vLLM's own answer.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from moe_bias.mistakes import UserError
from moe_bias.serving.versions import adapter_names
from moe_bias.variables import ServingVariables, from_variables

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

MODELS = "/v1/models"
ANSWERING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""What reads `vllm_xargs`. Elsewhere they would be dropped without a word, so vLLM gets to refuse the name there."""


class AdapterNames:
    """ASGI middleware around vLLM's application."""

    def __init__(self, app: Application) -> None:
        """Raises UserError where MOE_BIAS_ADAPTERS is not set."""
        folder = from_variables(ServingVariables).adapters
        if folder is None:
            raise UserError("MOE_BIAS_ADAPTERS is not set: it names the folder of the adapters to serve")
        self._app, self._folder = app, folder

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request or passes it on."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        match scope.get("method"):
            case "POST" if path in ANSWERING:
                await self._ask(scope, receive, send)
            case "GET" if path == MODELS or path.startswith(MODELS + "/"):
                await self._describe(path.removeprefix(MODELS), scope, receive, send)
            case _:
                await self._app(scope, receive, send)

    async def _ask(self, scope: Message, receive: Receive, send: Send) -> None:
        given = await _read(receive)
        try:
            body = with_adapter(given, _served_names(scope))
        except UserError as error:
            refusal = {"message": str(error), "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
            await _send_json(send, 400, [(b"content-type", b"application/json")], {"error": refusal})
            return
        headers = _with_length(scope["headers"], len(body))
        await self._app({**scope, "headers": headers}, _replayed(body, receive), send)

    async def _describe(self, rest: str, scope: Message, receive: Receive, send: Send) -> None:
        """All models, or the one named after the slash in `rest`, of which vLLM itself knows nothing."""
        kept: list[Message] = []

        async def keep(message: Message) -> None:
            kept.append(message)

        await self._app({**scope, "path": scope["path"].removesuffix(rest)}, receive, keep)
        content = self._described(kept, rest.removeprefix("/"))
        if content is None:
            await self._app(scope, receive, send)
        else:
            await _send_json(send, 200, kept[0]["headers"], content)

    def _described(self, kept: Sequence[Message], name: str) -> object:
        """What there is to say of `name`, or of all models; None where vLLM's own answer stands."""
        if kept[0]["status"] != 200:
            return None
        listed = json.loads(b"".join(message.get("body", b"") for message in kept[1:]))
        listed["data"] += [
            {**card, "id": f"{card['id']}:{adapter}", "root": str(self._folder / adapter), "parent": card["id"]}
            for card in listed["data"]
            if card["parent"] is None
            for adapter in adapter_names(self._folder)
        ]
        return next((card for card in listed["data"] if card["id"] == name), None) if name else listed


def with_adapter(body: bytes, served: Sequence[str]) -> bytes:
    """The request with `BASE:ADAPTER` taken apart and mappings as text; the very same bytes where it has neither.

    Raises UserError where `vllm_xargs` asks for another adapter than the name does, and on beam search with
    an adapter. What else is wrong with a request vLLM says itself.
    """
    request = _mapping(body)
    base, adapter = _split(str(request.get("model")), served)
    asked = request.get("vllm_xargs") or {}
    if not isinstance(asked, dict):
        return body
    if adapter:
        asked = {"moe_bias": adapter, **asked}
        if asked["moe_bias"] != adapter:
            raise UserError(
                f"model {request['model']!r} asks for the adapter {adapter!r} and vllm_xargs.moe_bias for "
                f"{asked['moe_bias']!r}; give one of them"
            )
    if "moe_bias" in asked and request.get("use_beam_search"):
        raise UserError("vLLM's beam search forgets which adapter a request asks for; leave use_beam_search out")
    mapping = asked.get("moe_bias")
    if isinstance(mapping, dict):
        asked = {**asked, "moe_bias": json.dumps(mapping)}
    elif not adapter:
        return body
    return json.dumps({**request, "model": base, "vllm_xargs": asked}).encode()


def _mapping(body: bytes) -> dict[str, Any]:
    """The request, or an empty one where the body is no JSON object."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return request if isinstance(request, dict) else {}


def _split(model: str, served: Sequence[str]) -> tuple[str, str]:
    """BASE and ADAPTER; the model itself and nothing where it is a served name, or starts with none."""
    bases = [base for base in served if model.startswith(f"{base}:")]
    if model in served or not bases:
        return model, ""
    base = max(bases, key=len)
    return base, model.removeprefix(f"{base}:")


def _served_names(scope: Message) -> list[str]:
    """The names of vLLM's `--served-model-name`, LoRA's not among them."""
    return [path.name for path in scope["app"].state.openai_serving_models.base_model_paths]


async def _read(receive: Receive) -> bytes:
    """The whole body, or what there was of it when the client went away."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, and then what there is to receive: that the client goes away."""
    pieces = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_next() -> Message:
        return pieces.pop() if pieces else await receive()

    return receive_next


async def _send_json(send: Send, status: int, headers: Headers, content: object) -> None:
    body = json.dumps(content).encode()
    await send({"type": "http.response.start", "status": status, "headers": _with_length(headers, len(body))})
    await send({"type": "http.response.body", "body": body})


def _with_length(headers: Headers, length: int) -> Headers:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]
