"""Learning beside vLLM's own server: `--middleware moe_bias.server.on_vllm.TeachingRoutes`, see `serve --learn`.

It begins when the server does, and ends with it. The routes are those of `teaching`; all else passes as it is. vLLM
puts such a class outside its check of API keys: who may teach is said by the keys of the adapters.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import ExitStack
from typing import Any

from starlette.concurrency import run_in_threadpool

from moe_bias.config import ModelConfig
from moe_bias.folder_lock import locked
from moe_bias.frozen import load_tokenizer
from moe_bias.learning.fresh import FRESH
from moe_bias.learning.service import Learning
from moe_bias.mistakes import UserError
from moe_bias.saved_embedding import without_backbone
from moe_bias.server.app import guarded
from moe_bias.server.keys import Keys
from moe_bias.server.metrics import LearningCounters
from moe_bias.server.teaching import Teaching
from moe_bias.server.vllm_served import VllmServed, served_answer
from moe_bias.server.vllm_settings import VllmLearning
from moe_bias.serving.following import add_follower, remove_follower
from moe_bias.serving.kept_answers import AnswerKeeping, KeptAnswer
from moe_bias.serving.names import Application, Message, Receive, Send
from moe_bias.serving.notes import kept_states
from moe_bias.serving.recording import RowLayout
from moe_bias.tasks.conversations import answer_ends
from moe_bias.variables import LEARNING

_LOG = logging.getLogger(__name__)


class TeachingRoutes:
    """ASGI middleware around vLLM's application."""

    def __init__(self, app: Application) -> None:
        """Raises UserError where MOE_BIAS_LEARNING is not set, or not as `VllmLearning` has it."""
        given = os.environ.get(LEARNING)
        if given is None:
            raise UserError(f"{LEARNING} is not set, which says where what is learned is kept")
        self._app, self._settings = app, VllmLearning.model_validate_json(given)
        self._learning: Learning | None = None
        self._teaching: Application | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request or passes it on."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and self._teaching is not None and _is_ours(scope):
            await self._teaching({**scope}, receive, send)  # which calls itself the scope's application
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: Message, receive: Receive, send: Send) -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._settings.root, "serve", shared=False, option="--learn"))
                await run_in_threadpool(self._begin, scope["app"].state, asyncio.get_running_loop())
            except UserError as error:
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return

            async def send_when_closed(message: Message) -> None:
                if message["type"].startswith("lifespan.shutdown") and self._learning is not None:
                    remove_follower(self._keeping)
                    await run_in_threadpool(self._learning.close)
                await send(message)

            await self._app(scope, receive, send_when_closed)

    def _begin(self, state: Any, loop: asyncio.AbstractEventLoop) -> None:
        settings, config = self._settings, state.vllm_config.model_config
        keys = Keys() if settings.key_file is None else Keys.read(settings.key_file)
        named = ModelConfig(model=config.model, trust_remote_code=config.trust_remote_code)
        model, head = without_backbone(named, config.dtype)
        tokenizer = load_tokenizer(named)
        ends = answer_ends(model, tokenizer)
        kept = kept_states(RowLayout.of_model(head.hidden_size, config.dtype))
        if kept is None:
            raise UserError("no hidden states are kept on this server; it needs vLLM's plugin moe_bias")
        learning = Learning(settings.root, settings.given, head, settings.config, settings.limits)
        for sentence in learning.said_changes():
            _LOG.warning(sentence)
        for name in keys.names:
            if not (learning.adapters / name).exists():
                learning.begin(name, settings.root / FRESH)

        def keep(answer: KeptAnswer) -> None:
            learning.spool.keep(served_answer(answer, ends))

        self._keeping = AnswerKeeping(kept, keep)
        add_follower(self._keeping)
        served = VllmServed(state.engine_client, loop, kept, learning.adapters, head, config.max_model_len)
        teaching = Teaching(served, learning, keys, LearningCounters(), tokenizer, ends)
        self._learning, self._teaching = learning, guarded(teaching.routes, local=settings.local)


def _is_ours(scope: Message) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == "/v1/feedback" or path == "/v1/adapters" or path.startswith("/v1/adapters/")
