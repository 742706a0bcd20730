"""The engine: one thread that owns the frozen model, and answers many requests at once.

Rows of all requests decode together, each under its own adapters; they join and leave between two tokens. What has
been computed of a conversation is kept, whichever adapter an answer to it was under, so that its next turn, or the
same question with another adapter, computes only what is new. An answer keeps the versions of its adapters that it
began with.

While the model runs its output embedding is another function (see `captured_hidden`), so nothing may use the model
beside the engine but through `call`.

Shapes: B rows, T tokens of an answer, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import queue
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor

from moe_bias.adapter.embedding import embedding_sample
from moe_bias.features.extract import Features
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer, at_least_float32, entropy_from_logits
from moe_bias.learning.spool import ServedAnswer
from moe_bias.mistakes import UserError, reason_of, shown
from moe_bias.rollout.decoding import Answer
from moe_bias.server.answer import (
    Answering,
    Asked,
    Ended,
    Failed,
    Given,
    Keeper,
    Listener,
    Reason,
    Written,
    given_features,
)
from moe_bias.server.batch import Batch
from moe_bias.server.choice import Choice, choose
from moe_bias.server.prefixes import KeysValues, Prefix, Prefixes, extended
from moe_bias.server.together import MOST_TOKENS, Reading, Text, can_pass_together
from moe_bias.serving.pool import AdapterPool
from moe_bias.serving.versions import AdapterFolder, read_version
from moe_bias.tasks.conversations import answer_ends

Result = TypeVar("Result")
PREFIX_BYTES = 2**30
ADAPTER_BYTES = 2**30
ROWS = 8
"""Answers that are written at once where nothing else is said; others wait."""
_log = logging.getLogger(__name__)


class EngineClosedError(RuntimeError):
    """Nothing more is answered."""


class Engine:
    """Answers under the adapters of a folder, on its own thread until `close`.

    `adapters` is the folder, which may change meanwhile (None: the plain model alone). `keeper` gets every answer under
    one adapter when it ends, on the engine's thread, so it must return at once.
    """

    def __init__(
        self,
        base: Frozen,
        adapters: Path | None = None,
        keeper: Keeper | None = None,
        *,
        rows: int = ROWS,
        prefix_bytes: int = PREFIX_BYTES,
        adapter_bytes: int = ADAPTER_BYTES,
    ) -> None:
        """Raises UserError where `adapters` is no folder, or the model cannot go on from keys and values."""
        self.base, self.keeper = base, keeper
        _refuse_unable(base)
        sizes = base.head.hidden_size, base.head.vocab_size
        sample = embedding_sample(base.head.rows, *sizes)
        self._versions = tempfile.TemporaryDirectory(prefix="moe-bias-")
        self._folder = None
        if adapters is not None:
            self._folder = AdapterFolder(adapters, Path(self._versions.name), *sizes, lambda: sample)
        self._pool = AdapterPool(self._load, adapter_bytes)
        self._tokenizer = copy.deepcopy(base.tokenizer)  # one tokenizer is not for two threads
        self._stop_ids = frozenset(answer_ends(base.model, base.tokenizer))
        self._prefixes, self._most_rows = Prefixes(prefix_bytes), rows
        self._batch, self._rows = Batch(base.model), list[Answering]()
        self._hidden_BD = torch.empty(0, sizes[0])
        self._waiting: deque[Answering] = deque()
        self._readings, self._passes_together = list[Reading](), can_pass_together(base.model)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing, self._is_closed = Lock(), False
        self._thread = Thread(target=self._work, name="moe-bias engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; answers that are not complete fail."""
        with self._closing:
            self._is_closed = True
            self._inbox.put(None)
        self._thread.join()
        self._versions.cleanup()

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters in the folder now, fit to be served or not."""
        return [] if self._folder is None else self._folder.names()

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None where the model does not tell."""
        found = getattr(self.base.model.config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)

    @property
    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._is_closed

    def version(self, adapter: str) -> Path:
        """The folder of the version that the adapter's files are in now; it never changes. For any thread.

        Raises UserError where there is no such adapter, or it cannot be served.
        """
        if self._folder is None:
            raise UserError(f"there is no adapter {shown(adapter)} on this server: it was started without a folder")
        return self._folder.version(adapter)

    def submit(self, asked: Asked, listener: Listener) -> Answering:
        """Begins an answer, which the listener is told of until it is `Ended` or `Failed`. For any thread.

        A prompt without tokens, or too long for the model, is the caller's to refuse.
        """
        answering = Answering(asked, listener, self._decode)
        self._put(lambda: self._waiting.append(answering))
        return answering

    def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function on the engine's thread, between two tokens, and returns what it returns, or raises."""
        future: Future[Result] = Future()

        self._put(lambda: fulfil(future, function))
        return future.result()

    def features_of(self, prompt_ids: Sequence[int], answers: Sequence[Given], adapter: str) -> list[Features]:
        """Features of answers to a prompt, one example each, at temperature 1, on the adapter's support.

        For any thread. Of an answer whose hidden states are not known, of which there is one at most, only those tokens
        go through the model that no conversation of late began with, beside the next token of the answers that are
        written. `position` is a token's place in its whole answer. Raises UserError where there is no such adapter, or
        an answer without tokens.
        """
        if not prompt_ids or not all(answer.tokens for answer in answers):
            raise UserError("features are those of an answer of one token or more, after a prompt of one or more")
        version, found = self.version(adapter), Future[list[Features]]()
        self._put(lambda: self._begin_reading(list(prompt_ids), answers, version, found))
        return found.result()

    def layer(self, adapter: str) -> MoEBiasLayer:
        """The frozen layer of the adapter's version now, which is not to be changed. Raises UserError as `version`."""
        version = self.version(adapter)
        return self.call(lambda: self._pool.get(version))

    def _put(self, item: Callable[[], None]) -> None:
        with self._closing:
            if self._is_closed:
                raise EngineClosedError("the server was stopped")
            self._inbox.put(item)

    def _begin_reading(
        self, prompt: list[int], answers: Sequence[Given], version: Path, found: Future[list[Features]]
    ) -> None:
        unread = [answer for answer in answers if answer.hidden is None]
        assert len(unread) < 2

        def finish(prefix: Prefix | None) -> None:
            hidden = None if prefix is None else prefix.hidden[len(prompt) - 1 :]
            known = [replace(answer, hidden=hidden) if answer.hidden is None else answer for answer in answers]
            fulfil(found, lambda: given_features(self.base.head, known, self._pool.get(version).support_or_all()))

        if not unread:
            finish(None)
        else:
            self._readings.append(Reading((*prompt, *unread[0].tokens[:-1]), finish, found.set_exception))

    def _load(self, version: Path) -> MoEBiasLayer:
        head = self.base.head
        return read_version(version, head.hidden_size, head.vocab_size, head.rows).to(head.device)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _spell(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def _work(self) -> None:
        while self._read_inbox():
            self._drop_called_off()
            try:
                self._admit()
                self._step()
                self._read_alone()
            except Exception as error:  # whatever it is, the next request is to be answered
                _log.exception("the engine failed")
                self._fail_all(f"the server failed at this answer: {reason_of(error)}")
        self._fail_all("the server was stopped")

    def _read_inbox(self) -> bool:
        """Does what came in, waiting for something where there is nothing else to do; False at the end."""
        is_idle = not self._rows and not self._waiting and not self._readings
        while is_idle or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return False
            item()
            is_idle = False
        return True

    def _drop_called_off(self) -> None:
        self._waiting = deque(answering for answering in self._waiting if not answering.is_called_off)
        for place in reversed(range(len(self._rows))):
            if self._rows[place].is_called_off:
                self._leave(place)

    def _admit(self) -> None:
        """Takes a waiting request in, one between two tokens of the others."""
        if not self._waiting or len(self._rows) == self._most_rows:
            return
        answering = self._waiting.popleft()
        prompt = list(answering.asked.prompt)
        try:
            answering.layers = [(name, self._pool.get(version)) for name, version in answering.asked.adapters.items()]
            known = self._prefixes.longest(prompt)
            answering.cached_tokens = 0 if known is None else len(known)
            prefix = extended(self.base.model, known, prompt)
        except Exception as error:  # of this request alone, such as a prompt that memory does not hold
            _log.exception("a prompt failed")
            answering.listener(Failed(f"the server failed at this prompt: {reason_of(error)}"))
            return
        self._prefixes.add(prefix)
        answering.hidden = [prefix.hidden]
        self._batch.join(prefix)
        self._rows.append(answering)
        self._hidden_BD = torch.cat([self._hidden_BD.to(prefix.hidden), prefix.hidden[-1:]])

    @torch.no_grad()
    def _step(self) -> None:
        """One token of every row."""
        if not self._rows:
            return
        choices = self._choices()
        tokens = []
        for place in reversed(range(len(self._rows))):
            choice = choices[place]
            reason = self._take(self._rows[place], choice)
            if reason is None:
                tokens.append(choice.token)
            else:
                self._finish(place, reason)
        if self._rows:
            self._hidden_BD = self._next(tokens[::-1])
            for answering, hidden_1D in zip(self._rows, self._hidden_BD.split(1), strict=True):
                answering.hidden.append(hidden_1D)

    def _next(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states (B, D) after the next token of each row; texts that are short are read in the same pass."""
        waiting = self._readings if self._passes_together else []
        texts = [(one, Text(self._prefixes.longest(one.tokens), one.tokens)) for one in waiting]
        beside = [(one, text) for one, text in texts if 0 < len(text.new) <= MOST_TOKENS]
        if not beside:
            return self._batch.next(tokens)
        hidden_BD, prefixes = self._batch.next_beside(tokens, [text for _, text in beside])
        for (reading, _), prefix in zip(beside, prefixes, strict=True):
            self._readings.remove(reading)
            self._prefixes.add(prefix)
            reading.finish(prefix)
        return hidden_BD

    def _read_alone(self) -> None:
        """Reads what waits still, a text at a time."""
        while self._readings:
            reading = self._readings.pop(0)
            try:
                prefix = extended(self.base.model, self._prefixes.longest(reading.tokens), reading.tokens)
            except Exception as error:  # of this text alone, such as one that memory does not hold
                reading.failed(error)
                continue
            self._prefixes.add(prefix)
            reading.finish(prefix)

    def _choices(self) -> list[Choice]:
        head = self.base.head
        logits_BV = head.logits(self._hidden_BD)
        entropy_B = entropy_from_logits(logits_BV)
        return [
            choose(head, answering, self._hidden_BD[row], logits_BV[row], entropy_B[row], self._spell)
            for answering, row in zip(self._rows, _single_rows(len(self._rows)), strict=True)
        ]

    def _take(self, answering: Answering, choice: Choice) -> Reason | None:
        """Adds a token to an answer, and tells it; says why the answer ends here, if it does."""
        ids = answering.answer.token_ids
        if choice.token in self._stop_ids:
            answering.answer = Answer(ids, choice.token)
            return "stop"
        answering.answer = Answer([*ids, choice.token], None)
        answering.listener(Written(answering.text.add(choice.token), choice.numbers))
        if answering.text.stopped:
            return "stop"
        return "length" if len(ids) + 1 == answering.asked.limit else None

    def _finish(self, place: int, reason: Reason) -> None:
        answering = self._rows[place]
        self._leave(place)
        try:
            self._keep(answering)
        except Exception:  # of the keeper's own code: whoever asked is to have the answer
            _log.exception("an answer was not kept")
        asked, count = answering.asked, len(answering.answer.all_ids)
        answering.listener(Ended(answering.text.finish(), reason, count, len(asked.prompt), answering.cached_tokens))

    def _keep(self, answering: Answering) -> None:
        if self.keeper is None or len(answering.layers) != 1:
            return
        asked, answer = answering.asked, answering.answer
        hidden_TD = at_least_float32(answering.hidden_states()).cpu()
        finished = answer.all_ids != answer.token_ids
        self.keeper(
            ServedAnswer(answering.id, answering.layers[0][0], list(asked.prompt), answer.all_ids, hidden_TD, finished)
        )

    def _leave(self, place: int) -> None:
        """Takes a row out; what was computed for it stays for the next turn."""
        answering = self._rows.pop(place)
        layers: tuple[KeysValues, ...] = self._batch.leave(place)
        hidden_LD = torch.cat(answering.hidden)
        tokens = (*answering.asked.prompt, *answering.answer.token_ids)[: len(hidden_LD)]
        self._prefixes.add(Prefix(tokens, hidden_LD, layers))
        self._hidden_BD = torch.cat([self._hidden_BD[:place], self._hidden_BD[place + 1 :]])

    def _fail_all(self, sentence: str) -> None:
        failed, self._rows, self._waiting = [*self._rows, *self._waiting], [], deque()
        unread, self._readings = self._readings, []
        self._batch = Batch(self.base.model)
        self._hidden_BD = self._hidden_BD[:0]
        for answering in failed:
            answering.listener(Failed(sentence))
        for reading in unread:
            reading.failed(EngineClosedError(sentence))


def fulfil(future: Future[Result], function: Callable[[], Result]) -> None:
    """The function's result, or what it raises, as the future's."""
    try:
        future.set_result(function())
    except BaseException as error:  # of whatever kind, it is the caller's
        future.set_exception(error)


def _single_rows(count: int) -> list[slice]:
    return [slice(place, place + 1) for place in range(count)]


@torch.no_grad()
def _refuse_unable(base: Frozen) -> None:
    """Raises UserError where hidden states after keys and values are not those of the whole text."""
    kind, tokens = type(base.model).__name__, [0, 1, 2]
    try:
        first = extended(base.model, None, tokens[:2])
        found_LD, whole_LD = extended(base.model, first, tokens).hidden, extended(base.model, None, tokens).hidden
    except Exception as error:  # of the model's own code
        reason = f"it does not go on from keys and values ({reason_of(error)})"
        raise UserError(f"a {kind} cannot be served: {reason}") from error
    distance = float((found_LD.float() - whole_LD.float()).norm() / whole_LD.float().norm())
    if not distance < 0.05:  # bfloat16 rounds by less than a hundredth
        raise UserError(
            f"a {kind} cannot be served: its states after keys and values are {distance:.0%} away from the text's"
        )
