"""The server's routes: OpenAI's protocol, what the chat page asks besides, and what watches a server.

GET  /health                  200 while the engine runs
GET  /metrics                 counters in Prometheus's form
GET  /v1/models               the model as BASE, and each adapter as BASE:ADAPTER
POST /v1/chat/completions     see `requests`
GET  /v1/adapters             whether the server learns, and its adapters
GET  /chat                    the page
POST /chat/strength           {"id": answer, "strength": number, "adapter": name or none}: from the next token on
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from moe_bias.mistakes import UserError, shown
from moe_bias.server.answer import Answering
from moe_bias.server.engine import Engine
from moe_bias.server.keys import LOOPBACK
from moe_bias.server.metrics import Counters
from moe_bias.server.page import page
from moe_bias.server.requests import RefusedError, checked_strength, read_chat
from moe_bias.server.stream import FailedError, Telling

LARGEST_BODY = 2**23
"""Bytes of a request: more text than any context holds."""
LIMIT = 512
"""Tokens of an answer where the request names none."""


def make_app(
    engine: Engine,
    extra_routes: Sequence[BaseRoute] = (),
    *,
    name: str = "",
    limit: int = LIMIT,
    local: bool = True,
    counters: Counters | None = None,
    closing: Callable[[], None] | None = None,
) -> Starlette:
    """The application. It owns the engine, and closes it when it ends, after `closing`.

    `extra_routes` go before those here. `name` is what clients call the model, by default its folder's or the last
    part of its Hub id. `local`: only requests to this machine's own names are answered, so that a page of another
    site cannot reach the server by a name of its own.
    """
    name = name or Path(str(engine.base.model.name_or_path)).name or type(engine.base.model).__name__
    server = _Server(engine, name, limit, counters or Counters())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if closing is not None:
            await run_in_threadpool(closing)
        await run_in_threadpool(engine.close)

    own = [
        Route("/", lambda request: RedirectResponse("/chat")),
        Route("/chat", server.chat),
        Route("/chat/strength", server.strength, methods=["POST"]),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/adapters", server.adapters),
        Route("/v1/chat/completions", server.complete, methods=["POST"]),
    ]
    return guarded([*extra_routes, *own], local=local, lifespan=lifespan)


def guarded(routes: Sequence[BaseRoute], *, local: bool, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """An application of these routes, whose refusals are of OpenAI's form; see `make_app` for `local`."""
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK, www_redirect=False)] if local else []
    return Starlette(
        routes=routes,
        middleware=[*hosts, Middleware(SameOrigin)],
        exception_handlers={
            RefusedError: _refused,
            UserError: _refused,
            FailedError: _failed,
            HTTPException: _not_served,
        },
        lifespan=lifespan,
        max_body_size=LARGEST_BODY,
    )


class SameOrigin:
    """Refuses what a page of another site asks in its reader's name: a browser tells whose page it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request or passes it on."""
        if scope["type"] == "http":
            headers = Request(scope).headers
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != headers.get("host"):
                refusal = error_response(f"the origin {shown(origin)} is not this server's", status=403)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Server:
    """What the routes share. All of it runs on the event loop, where the tokenizer is used too."""

    def __init__(self, engine: Engine, name: str, limit: int, counters: Counters) -> None:
        self._engine, self._name, self._limit = engine, name, limit
        self._running: dict[str, Answering] = {}
        self._counters = counters

    async def complete(self, request: Request) -> Response:
        """One answer, whole or streamed."""
        asked = read_chat(await read_json_body(request), self._engine, self._name, self._limit)
        telling = Telling(self._engine, asked)
        self._running[telling.answering.id] = telling.answering
        self._counters.begun(asked.asked.adapters)
        if asked.is_streamed:
            return _Streamed(telling, lambda: self._ended(telling.answering))
        try:
            answer = await telling.whole(request.is_disconnected)
        finally:
            self._ended(telling.answering)
        return Response(status_code=499) if answer is None else JSONResponse(answer)

    def _ended(self, answering: Answering) -> None:
        answering.call_off()
        del self._running[answering.id]
        self._counters.written(answering.asked.adapters, len(answering.answer.all_ids))

    async def strength(self, request: Request) -> Response:
        """Another strength of an answer that is being written."""
        body = await read_json_body(request)
        if not isinstance(body, dict) or not isinstance(body.get("id"), str):
            raise RefusedError("id: name the answer whose strength is to change", "id")
        strength = checked_strength(body.get("strength"), "strength")
        answering = self._running.get(body["id"])
        if answering is None:
            raise RefusedError(f"no answer {shown(body['id'])} is being written", "id", 404)
        answering.set_strength(strength, str(body.get("adapter") or ""))
        return JSONResponse({"id": answering.id, "strength": strength})

    async def models(self, request: Request) -> Response:
        """The model and its adapters."""
        return JSONResponse({"object": "list", "data": self._cards()})

    async def model(self, request: Request) -> Response:
        """One of them."""
        asked = request.path_params["name"]
        found = next((card for card in self._cards() if card["id"] == asked), None)
        if found is None:
            raise RefusedError(f"there is no model {shown(asked)} on this server", "model", 404, "model_not_found")
        return JSONResponse(found)

    def _cards(self) -> list[dict[str, Any]]:
        card = {"object": "model", "created": 0, "owned_by": "moe-bias"}
        adapters = [{"id": f"{self._name}:{one}", **card, "parent": self._name} for one in self._engine.adapters]
        return [{"id": self._name, **card, "parent": None}, *adapters]

    async def adapters(self, request: Request) -> Response:
        """What there is to choose from. A server that learns has a route of its own before this one."""
        return JSONResponse({"learning": False, "adapters": [{"name": name} for name in self._engine.adapters]})

    async def health(self, request: Request) -> Response:
        """Whether the engine runs."""
        return JSONResponse({"status": "ok"}) if self._engine.is_running else JSONResponse({"status": "down"}, 503)

    async def metrics(self, request: Request) -> Response:
        """The counters."""
        return Response(self._counters.text(), media_type=self._counters.media_type)

    async def chat(self, request: Request) -> Response:
        """The page."""
        return page(self._name)


class _Streamed(StreamingResponse):
    """An answer as it is written; `ended` is called when it is complete or the client has gone."""

    def __init__(self, telling: Telling, ended: Callable[[], None]) -> None:
        super().__init__(telling.server_sent(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._when_ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._when_ended()


async def read_json_body(request: Request) -> Any:
    """The body as JSON. Raises RefusedError where it is none."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RefusedError("the body is no JSON document") from error


def error_response(sentence: str, field: str | None = None, status: int = 400, code: str | None = None) -> JSONResponse:
    """A refusal in the shape of OpenAI's errors."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": sentence, "type": kind, "param": field, "code": code}
    return JSONResponse({"error": error}, status)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, RefusedError):
        return error_response(str(error), error.field, error.status, error.code)
    return error_response(str(error))


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(str(error), status=500)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    return error_response(f"{shown(asked)}: {error.detail.lower()}", status=error.status_code)
