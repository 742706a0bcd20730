"""The routes by which an adapter learns while it is served.

POST /v1/feedback                   {"id": answer, and one of "edit": text, "reward": from -1 to 1, "prefer": answer}
POST /v1/adapters/NAME/undo         back to the version before
POST /v1/adapters/NAME/freeze       keep lessons and learn none; /unfreeze learns again
GET  /v1/adapters/NAME/history      what became of the last entries
GET  /v1/adapters                   the adapters, and that the server learns

A lesson is on the disk before it is answered. The answer waits for what becomes of it; with "wait": false it is sent
at once, with status 202.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from moe_bias.features.extract import Features
from moe_bias.learning.learner import FREEZE, UNDO, UNFREEZE
from moe_bias.learning.lessons import Lesson, lesson_of_parts, pair_parts, reward_lesson
from moe_bias.learning.service import Learning, LearningStoppedError, Told
from moe_bias.learning.spool import ServedAnswer
from moe_bias.mistakes import UserError, reason_of, shown
from moe_bias.server.answer import Given
from moe_bias.server.app import read_json_body
from moe_bias.server.engine import Engine
from moe_bias.server.keys import Keys
from moe_bias.server.metrics import LearningCounters
from moe_bias.server.requests import RefusedError
from moe_bias.tasks.conversations import answer_ends

_KINDS = ("edit", "reward", "prefer")


class Served(Protocol):
    """The engine whose answers are taught, for any thread."""

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are served now."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together, where that is known."""
        ...

    def features_of(self, prompt_ids: Sequence[int], answers: Sequence[Given], adapter: str) -> list[Features]:
        """Features of answers to a prompt, one example each, on the adapter's support; of one the states are not known.

        Raises UserError where there is no such adapter.
        """
        ...


class Teaching:
    """The routes, on the event loop, where the tokenizer is used too; `ends` are the tokens that end an answer."""

    def __init__(
        self,
        served: Served,
        learning: Learning,
        keys: Keys,
        counters: LearningCounters,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
    ) -> None:
        self._served, self._learning, self._keys, self._counters = served, learning, keys, counters
        self._tokenizer, self._ends = tokenizer, ends

    @classmethod
    def of_engine(cls, engine: Engine, learning: Learning, keys: Keys, counters: LearningCounters) -> Teaching:
        """What teaches our own engine's answers."""
        base = engine.base
        return cls(engine, learning, keys, counters, base.tokenizer, answer_ends(base.model, base.tokenizer))

    @property
    def routes(self) -> list[Route]:
        """For the application, before its own."""
        events = [
            Route(f"/v1/adapters/{{name}}/{event}", self._telling(event), methods=["POST"])
            for event in (UNDO, FREEZE, UNFREEZE)
        ]
        return [
            Route("/v1/feedback", self.feedback, methods=["POST"]),
            Route("/v1/adapters", self.adapters),
            Route("/v1/adapters/{name}/history", self.history),
            *events,
        ]

    async def feedback(self, request: Request) -> Response:
        """Takes a lesson."""
        started, body = time.perf_counter(), await read_json_body(request)
        answer, kind = self._answer(request, body), _kind_of(body)
        lesson = await self._lesson(request, answer, kind, body[kind])
        told = await self._told(answer.adapter, lesson)
        if body.get("wait") is False:
            return JSONResponse({"adapter": answer.adapter}, 202)
        return JSONResponse(await self._outcome(answer.adapter, told, started))

    def _telling(self, event: str) -> Any:
        async def tell(request: Request) -> Response:
            started, name = time.perf_counter(), self._allowed(request)
            told = await self._told(name, event)
            return JSONResponse(await self._outcome(name, told, started))

        return tell

    async def history(self, request: Request) -> Response:
        """What became of the last entries, the oldest first."""
        name = self._allowed(request)
        try:
            events = await run_in_threadpool(self._learning.history, name)
        except LearningStoppedError as error:
            raise RefusedError(str(error), status=503) from error
        return JSONResponse({"adapter": name, "events": events})

    async def adapters(self, request: Request) -> Response:
        """What there is to choose from, and what the request's key may teach."""
        allowed = request.headers.get("authorization")
        cards = [{"name": name, "learns": self._keys.allow(allowed, name)} for name in self._served.adapters]
        learns = any(card["learns"] for card in cards)
        return JSONResponse({"learning": learns, "keyed": self._keys.are_needed, "adapters": cards})

    def _allowed(self, request: Request) -> str:
        """The adapter that the path names. One that is another's and one that is not there are answered alike."""
        name = str(request.path_params["name"])
        if not self._keys.allow(request.headers.get("authorization"), name) or name not in self._served.adapters:
            raise RefusedError(f"there is no adapter {shown(name)} that this key may teach", "name", 404)
        return name

    def _answer(self, request: Request, body: object) -> ServedAnswer:
        if not isinstance(body, Mapping):
            raise RefusedError(f"the body is no JSON object but {shown(body)}")
        return self._kept(request, body.get("id"), "id")

    def _kept(self, request: Request, identity: object, field: str) -> ServedAnswer:
        try:
            answer = self._learning.spool.get(identity)
        except UserError as error:
            raise RefusedError(str(error), field, 404) from error
        if not self._keys.allow(request.headers.get("authorization"), answer.adapter):
            raise RefusedError(f"there is no answer {shown(identity)} that this key may teach", field, 404)
        return answer

    async def _lesson(self, request: Request, answer: ServedAnswer, kind: str, given: object) -> Lesson:
        limit = self._learning.config.lesson_tokens
        try:
            if kind == "reward":
                reward = _reward(given)
                (served,) = await self._features(answer, Given.served(answer, slice(limit)))
                return reward_lesson(served, reward, limit)
            better = self._better(request, answer, kind, given)
            parts = pair_parts(better.tokens, answer.tokens, limit)
            cut = Given(better.tokens[parts[0]], None if better.hidden is None else better.hidden[parts[0]])
            return lesson_of_parts(*await self._features(answer, cut, Given.served(answer, parts[1])))
        except RefusedError:
            raise
        except UserError as error:
            raise RefusedError(str(error), kind) from error

    async def _features(self, answer: ServedAnswer, *given: Given) -> list[Features]:
        return await run_in_threadpool(self._served.features_of, answer.prompt, given, answer.adapter)

    def _better(self, request: Request, answer: ServedAnswer, kind: str, given: object) -> Given:
        if kind == "edit":
            return Given(self._edited(answer, given))
        better = self._kept(request, given, kind)
        if (better.adapter, better.prompt) != (answer.adapter, answer.prompt):
            raise UserError(f"prefer: {shown(given)} is an answer to another request, or under another adapter")
        return Given.served(better)

    def _edited(self, answer: ServedAnswer, text: object) -> list[int]:
        """The text's tokens; with the end that the answer had, or the first that there is."""
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"edit: give the answer's text as it should be, not {shown(text)}")
        tokens = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        room = self._served.context
        if room is not None and len(answer.prompt) + len(tokens) >= room:
            raise UserError(f"edit: the text is {len(tokens):,} tokens, and the model reads {room:,} with the prompt")
        end = answer.tokens[-1] if answer.finished else self._ends[0]
        return [*tokens, end]

    async def _told(self, name: str, what: Lesson | str) -> Told:
        try:
            if isinstance(what, Lesson):
                return await run_in_threadpool(self._learning.teach, name, what)
            return await run_in_threadpool(self._learning.tell, name, what)
        except LearningStoppedError as error:
            raise RefusedError(str(error), status=503) from error
        except OSError as error:
            raise RefusedError(f"the lesson could not be kept: {reason_of(error)}", status=507) from error

    async def _outcome(self, name: str, told: Told, started: float) -> dict[str, Any]:
        try:
            outcome = await asyncio.wrap_future(told)
        except LearningStoppedError as error:
            raise RefusedError(str(error), status=503) from error
        self._counters.told(name, outcome)
        milliseconds = 1e3 * (time.perf_counter() - started)
        renamed = {"feedback": outcome["number"], "kl_step": outcome["step_kl"], "kl_base": outcome["base_kl"]}
        kept = {name: value for name, value in outcome.items() if name not in ("number", "step_kl", "base_kl")}
        return {
            "adapter": name,
            **kept,
            **renamed,
            "milliseconds": milliseconds,
            "update_milliseconds": outcome["milliseconds"],
        }


def _kind_of(body: Mapping[str, Any]) -> str:
    given = [kind for kind in _KINDS if body.get(kind) is not None]
    if len(given) != 1:
        raise RefusedError(f"give one of edit, reward and prefer, not {' and '.join(given) or 'none of them'}")
    return given[0]


def _reward(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise RefusedError(f"reward: give a number from -1 to 1, not {shown(given)}", "reward")
    return float(given)
