"""Answers under one adapter with the hidden states that they were chosen from, where they leave vLLM's server.

The engine keeps the states (see `keeping`), and this side asks for it as a request comes in, and reads them when its
answer is complete.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from torch import Tensor
from vllm.v1.engine import EngineCoreRequest

from moe_bias.mistakes import UserError
from moe_bias.serving.following import Followed
from moe_bias.serving.keeping import KEEP
from moe_bias.serving.recording import Spool
from moe_bias.serving.requests import adapters_of

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class KeptAnswer:
    """`id` is the response's, `prompt` and `tokens` are ids, `hidden` (T, D) are what each token was chosen from."""

    id: str
    adapter: str
    prompt: list[int]
    tokens: list[int]
    hidden: Tensor


class AnswerKeeping:
    """Asks for the states of each answer under one adapter, and hands it on: see `Follower`."""

    def __init__(self, spool: Spool, keeper: Callable[[KeptAnswer], None]) -> None:
        self._spool, self._keeper = spool, keeper

    def begin(self, request: EngineCoreRequest, index: int) -> Followed | None:
        """See `Follower`. Several samples of one request have one id, so that none of them could be named."""
        params, adapters = request.sampling_params, adapters_of(request.sampling_params)
        if params is None or len(adapters) != 1 or index or params.n != 1 or not request.prompt_token_ids:
            return None
        prompt, rows = list(request.prompt_token_ids), params.max_tokens or 0
        file = KeptFile(self._spool, rows)
        params.extra_args = {**(params.extra_args or {}), KEEP: file.asked(len(prompt) - 1)}
        return _Kept(request.external_req_id or request.request_id, adapters[0], prompt, file, self._keeper)


class KeptFile:
    """A file of the engine's for `rows` states; it goes when nothing refers to it."""

    def __init__(self, spool: Spool, rows: int) -> None:
        self._spool, self._rows, self._name = spool, rows, uuid4().hex
        spool.create(self._name, rows)
        weakref.finalize(self, spool.remove, [self._name])

    def asked(self, start: int) -> list[str | int]:
        """The argument by which a request's states are kept there, from a position on."""
        return [self._name, start, self._rows]

    def read(self, rows: int) -> Tensor:
        """The first states (T, D). Raises UserError where one is not there."""
        return self._spool.read(self._name, rows)[1]

    def read_some(self) -> tuple[Tensor, Tensor]:
        """All states (T, D), and which of them are there, (T,) bool."""
        _, hidden_TD, there_T = self._spool.written(self._name, self._rows)
        return hidden_TD, there_T


class _Kept:
    """A request on its way."""

    def __init__(
        self, identity: str, adapter: str, prompt: list[int], file: KeptFile, keeper: Callable[[KeptAnswer], None]
    ) -> None:
        self._identity, self._adapter, self._prompt = identity, adapter, prompt
        self._file, self._keeper = file, keeper
        self._tokens: list[int] = []

    def written(self, token_ids: Sequence[int]) -> None:
        self._tokens += token_ids

    def ended(self) -> None:
        try:
            hidden_TD = self._file.read(len(self._tokens))
        except (UserError, OSError) as error:  # the answer itself is complete, and goes to who asked
            _LOG.warning("an answer cannot be taught: %s", error)
            return
        self._keeper(KeptAnswer(self._identity, self._adapter, self._prompt, self._tokens, hidden_TD))
