"""The answers of vLLM's server as `Teaching` reads them: their hidden states are the engine's.

An edited answer is a prompt to the engine, so that only those of its positions are computed whose keys and values are
not there; the states of the others are those of the answer that was served, which begins alike.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from vllm import SamplingParams

from moe_bias.adapter.embedding import embedding_sample
from moe_bias.backbone import Head
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer, at_least_float32
from moe_bias.learning.lessons import shared
from moe_bias.learning.spool import ServedAnswer
from moe_bias.mistakes import UserError
from moe_bias.server.answer import Given, given_features
from moe_bias.serving.keeping import KEEP
from moe_bias.serving.kept_answers import KeptAnswer, KeptFile
from moe_bias.serving.pool import AdapterPool
from moe_bias.serving.recording import Spool
from moe_bias.serving.versions import AdapterFolder, read_version

_LAYERS = 2**28
"""Bytes of layers that are held for their supports."""
_COMPLETION = re.compile(r"(cmpl-.*)-0")
"""The engine's name of the first answer of `/v1/completions`, which the client knows without the number."""


class VllmServed:
    """An engine's answers: see `Served`. `client` is vLLM's, which is asked on `loop`, the server's own."""

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        kept: Spool,
        adapters: Path,
        head: Head,
        context: int,
    ) -> None:
        """`adapters` is the folder that is served. Raises UserError where it is none."""
        self.context: int | None = context
        self._client, self._loop, self._kept, self._head = client, loop, kept, head
        self._versions = tempfile.TemporaryDirectory(prefix="moe-bias-")
        sizes = head.hidden_size, head.vocab_size
        sample = embedding_sample(head.rows, *sizes)
        self._folder = AdapterFolder(adapters, Path(self._versions.name), *sizes, lambda: sample)
        self._pool, self._lock = AdapterPool(self._read, _LAYERS), Lock()

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are served now."""
        return self._folder.names()

    def features_of(self, prompt_ids: Sequence[int], answers: Sequence[Given], adapter: str) -> list[Features]:
        """See `Served`. Raises UserError where the engine does not keep what it computes."""
        version, prompt = self._folder.version(adapter), list(prompt_ids)
        known = [answer for answer in answers if answer.hidden is not None]
        read = [
            answer if answer.hidden is not None else replace(answer, hidden=self._states(prompt, answer.tokens, known))
            for answer in answers
        ]
        with self._lock:
            support_M = self._pool.get(version).support_or_all()
        return given_features(self._head, read, support_M)

    def _read(self, version: Path) -> MoEBiasLayer:
        return read_version(version, self._head.hidden_size, self._head.vocab_size, self._head.rows)

    def _states(self, prompt: list[int], token_ids: list[int], known: Sequence[Given]) -> Tensor:
        """What each token of an answer is chosen from, (T, D), where those of others to the same prompt are known."""
        known_TD = torch.empty(0, self._head.hidden_size)
        for other in known:
            alike = 1 + shared(other.tokens, token_ids)
            if other.hidden is not None and alike > len(known_TD):
                known_TD = other.hidden[: min(alike, len(token_ids))]
        if len(known_TD) == len(token_ids):
            return known_TD
        hidden_TD, there_T = self._computed(prompt, token_ids, None)
        hidden_TD[: len(known_TD)], there_T[: len(known_TD)] = known_TD, True
        if not there_T.all():  # another request had these positions computed: compute them apart from all others
            hidden_TD, there_T = self._computed(prompt, token_ids, uuid4().hex)
        if not there_T.all():
            raise UserError(
                f"the engine kept {int(there_T.sum())} of {len(there_T)} states of the edited answer, as one does "
                "whose steps are one CUDA graph each; start it with -O.cudagraph_mode=PIECEWISE"
            )
        return hidden_TD

    def _computed(self, prompt: list[int], token_ids: list[int], salt: str | None) -> tuple[Tensor, Tensor]:
        """States (T, D) in float32 and which of them are there; under a salt nothing is taken from the cache."""
        file = KeptFile(self._kept, len(token_ids))
        asking = self._ask([*prompt, *token_ids[:-1]], file.asked(len(prompt) - 1), salt)
        asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        hidden_TD, there_T = file.read_some()
        return at_least_float32(hidden_TD), there_T

    async def _ask(self, tokens: list[int], keep: list[str | int], salt: str | None) -> None:
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args={KEEP: keep})
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if salt is not None:
            prompt["cache_salt"] = salt
        async for _ in self._client.generate(prompt, params, f"moe-bias-{uuid4().hex}"):
            pass


def served_answer(kept: KeptAnswer, ends: Sequence[int]) -> ServedAnswer:
    """An answer as it is taught, under the name that its client has for it."""
    completion = _COMPLETION.fullmatch(kept.id)
    name = completion[1] if completion else kept.id
    hidden_TD, finished = at_least_float32(kept.hidden), kept.tokens[-1] in ends
    return ServedAnswer(name, kept.adapter, kept.prompt, kept.tokens, hidden_TD, finished)
