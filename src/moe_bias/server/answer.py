"""One answer: what was asked, what is told of it while it is written, and what is kept of it.

Shapes: T tokens of an answer, L token limit, D hidden, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.combined import Part
from moe_bias.features.extract import Features, answer_features
from moe_bias.layer import MoEBiasLayer, at_least_float32
from moe_bias.learning.spool import ServedAnswer
from moe_bias.mistakes import UserError, shown
from moe_bias.rollout.decoding import Answer
from moe_bias.server.spelling import GrowingText

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Asked:
    """A request that was checked. `adapters` are versions by name, `strengths` those that are not the adapters' own.

    `temperature` 0 is greedy. `numbers`: each token is told with the numbers of `token_numbers`.
    """

    prompt: Sequence[int]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    limit: int = 512
    stops: Sequence[str] = ()
    numbers: bool = False


@dataclass(frozen=True)
class Written:
    """Text that was added to an answer, perhaps none, and the numbers of the token that added it, where asked for."""

    text: str
    numbers: dict[str, Any] | None = None


@dataclass(frozen=True)
class Ended:
    """The answer is complete; `text` is what of it was not told before."""

    text: str
    reason: Reason
    tokens: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Failed:
    """The answer goes no further, through no fault of the request's."""

    sentence: str


@dataclass(frozen=True, eq=False)
class Given:
    """An answer of which features are wanted: its tokens, from `start` on, and the hidden states (T, D) that all of
    them are chosen from, where they are known.
    """

    tokens: list[int]
    hidden: Tensor | None = None
    start: int = 0

    @classmethod
    def served(cls, answer: ServedAnswer, wanted: slice = slice(None)) -> Given:
        """Of an answer that was served."""
        return cls(answer.tokens[: wanted.stop], answer.hidden[: wanted.stop], wanted.start or 0)


def given_features(head: Head, answers: Sequence[Given], support_M: Tensor) -> list[Features]:
    """Features of answers whose hidden states are known, one example each: one product with the output embedding.

    `position` is a token's place in its whole answer.
    """
    known = [answer.hidden[answer.start :] for answer in answers if answer.hidden is not None]
    hidden_TD = torch.cat([at_least_float32(hidden).cpu() for hidden in known])
    token_T = torch.tensor([token for answer in answers for token in answer.tokens[answer.start :]])
    features, parts, begin = answer_features(head, hidden_TD, token_T, support_M), [], 0
    for answer in answers:
        part = features.at(slice(begin, begin + len(answer.tokens) - answer.start))
        parts.append(replace(part, position=part.position - begin + answer.start))
        begin += len(part)
    return parts


Event = Written | Ended | Failed
Listener = Callable[[Event], None]
"""Called on the engine's thread, so it must return at once."""


Keeper = Callable[[ServedAnswer], None]


class Answering:
    """An answer while it is written. Strengths may change, and it may be called off, from any thread."""

    def __init__(self, asked: Asked, listener: Listener, decode: Callable[[Sequence[int]], str]) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.asked, self.listener = asked, listener
        self.strengths = dict(asked.strengths)
        self.is_called_off = False
        self.text = GrowingText(decode, asked.stops)
        self.answer = Answer([], None)
        self.hidden: list[Tensor] = []
        self.cached_tokens = 0
        self.layers: list[tuple[str, MoEBiasLayer]] = []
        self._uniform_L = _uniform(asked)

    def set_strength(self, value: float, adapter: str = "") -> None:
        """Another strength from the next token on, of one adapter or of all. Raises UserError on one that it lacks."""
        names = [adapter] if adapter else list(self.asked.adapters)
        for name in names:
            if name not in self.asked.adapters:
                raise UserError(f"the answer {self.id} is without the adapter {shown(name)}")
            self.strengths[name] = value

    def call_off(self) -> None:
        """Nobody waits for the rest; it ends before the next token."""
        self.is_called_off = True

    def parts(self) -> list[Part]:
        """Layers and their strengths now."""
        return [(layer, self.strengths.get(name, layer.strength)) for name, layer in self.layers]

    def uniform(self) -> Tensor:
        """The number in [0, 1), float64 (1,), that the next token is drawn with."""
        assert self._uniform_L is not None
        place = len(self.answer.token_ids)
        return self._uniform_L[place : place + 1]

    def hidden_states(self) -> Tensor:
        """The hidden states (T, D) that the answer's tokens were chosen from."""
        hidden_LD = torch.cat(self.hidden)
        start = len(self.asked.prompt) - 1
        return hidden_LD[start : start + len(self.answer.all_ids)]


def _uniform(asked: Asked) -> Tensor | None:
    """(L,) float64: the same seed and limit draw as `moe_bias.generate` does."""
    if asked.temperature == 0:
        return None
    generator = torch.Generator().manual_seed(secrets.randbits(32) if asked.seed is None else asked.seed)
    return torch.rand(1, asked.limit, dtype=torch.float64, generator=generator)[0]
