"""An answer as OpenAI's protocol tells it: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from moe_bias.server.answer import Answering, Ended, Event, Failed, Written
from moe_bias.server.engine import Engine
from moe_bias.server.requests import ChatRequest

_LOOK_SECONDS = 1.0
"""How often it is looked whether a client that waits for a whole answer is still there."""


class FailedError(RuntimeError):
    """The server failed at an answer."""


class Telling:
    """The events of one answer, for the event loop that made it."""

    def __init__(self, engine: Engine, request: ChatRequest) -> None:
        self.request, self.created = request, int(time.time())
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.answering: Answering = engine.submit(request.asked, tell)

    async def events(self) -> AsyncIterator[Event]:
        """Each event as it comes; the answer is called off where nobody waits for the last."""
        event: Event | None = None
        try:
            while not isinstance(event, Ended | Failed):
                event = await self._events.get()
                yield event
        finally:
            self.answering.call_off()

    async def server_sent(self) -> AsyncIterator[str]:
        """The chunks of a streamed answer."""
        yield self._chunk({"role": "assistant", "content": ""})
        async for event in self.events():
            if isinstance(event, Written):
                if event.text or event.numbers is not None:
                    yield self._chunk({"content": event.text}, moe_bias=event.numbers)
            elif isinstance(event, Failed):
                yield _sent({"error": {"message": event.sentence, "type": "server_error", "param": None, "code": None}})
            else:
                if event.text:
                    yield self._chunk({"content": event.text})
                yield self._chunk({}, event.reason)
                if self.request.tells_usage:
                    yield _sent({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(event)})
        yield "data: [DONE]\n\n"

    async def whole(self, is_gone: Callable[[], Awaitable[bool]]) -> dict[str, Any] | None:
        """The complete answer; None where the client went away. Raises FailedError where the server failed."""
        text, numbers = "", list[dict[str, Any]]()
        events = self.events()
        coming = asyncio.ensure_future(anext(events))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=_LOOK_SECONDS)
                if not done:
                    if await is_gone():
                        return None
                    continue
                event = coming.result()
                if isinstance(event, Failed):
                    raise FailedError(event.sentence)
                text += event.text
                if isinstance(event, Ended):
                    return self._answer(text, event, numbers)
                if event.numbers is not None:
                    numbers.append({"text": event.text, **event.numbers})
                coming = asyncio.ensure_future(anext(events))
        finally:
            coming.cancel()
            self.answering.call_off()

    def _answer(self, text: str, end: Ended, numbers: list[dict[str, Any]]) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end.reason}
        own = {"moe_bias": numbers} if self.request.asked.numbers else {}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(end), **own}

    def _chunk(self, delta: dict[str, str], reason: str | None = None, **own: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        told = {name: value for name, value in own.items() if value is not None}
        return _sent({**self._head("chat.completion.chunk"), "choices": [choice], **told})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.answering.id, "object": kind, "created": self.created, "model": self.request.model}


def usage(end: Ended) -> dict[str, Any]:
    """Tokens of prompt and answer, end token included; `cached_tokens` were not computed for this request."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.tokens,
        "total_tokens": end.prompt_tokens + end.tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
