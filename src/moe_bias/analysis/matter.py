"""What an analysis looks at, a frozen model and a text with its hidden states, and how much it keeps of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moe_bias.analysis.answers import Answered
from moe_bias.analysis.survey import Marks, Text, mark
from moe_bias.analysis.token_classes import vocabulary_classes
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.features.store import FeatureStore
from moe_bias.frozen import Frozen
from moe_bias.mistakes import UserError
from moe_bias.support import RHO
from moe_bias.tasks.conversations import Corpus, Example
from moe_bias.training.problems import TaskData

_LEAST = {"top": 1, "contexts": 0, "flips": 0, "continuation": 1, "max_new_tokens": 1, "batch_size": 1}


@dataclass(frozen=True)
class Options:
    """What is of high entropy, and how much is kept.

    `rho` in (0, 1) is the share of the tokens that are of high entropy. Cards of experts have `top` tokens a side and
    `contexts` places; `flips` places are kept where the choice changes, those of largest KL, and both models go on for
    `continuation` tokens from there. Answers to problems have at most `max_new_tokens`; `batch_size` prompts go through
    the model at a time. Raises UserError on a value that cannot be.
    """

    rho: float = RHO
    top: int = 8
    contexts: int = 5
    flips: int = 20
    continuation: int = 24
    max_new_tokens: int = 192
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.rho < 1:
            raise UserError(f"`rho` is {self.rho:g}; give the share of high entropy, above 0 and below 1")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"`{name}` is {getattr(self, name)}; give at least {least}")


@dataclass(frozen=True)
class Matter:
    """All that is looked at. `examples` are by row, and none where their prompts are not known.

    `ground` and `answers`, the frozen model's to its problems, are there for a task alone.
    """

    base: Frozen
    text: Text
    kind: str
    name: str
    dropped: int = 0
    examples: Mapping[int, Example] = field(default_factory=dict)
    ground: TaskData | None = None
    answers: Sequence[Answered] = ()

    @classmethod
    def of_store(
        cls, base: Frozen, store: FeatureStore, rows: Sequence[int] | None, kind: str, name: str, corpus: Corpus | None
    ) -> Matter:
        """These examples of a store, all of them for None; `corpus` are the texts that it was extracted from."""
        text = Text(store) if rows is None else Text(store, torch.tensor(rows))
        examples = {} if corpus is None else dict(zip(corpus.rows, corpus.examples, strict=True))
        return cls(base, text, kind, name, store.dropped, examples)

    @classmethod
    def of_answers(
        cls, ground: TaskData, answers: Sequence[Answered], support: Sequence[int], batch_size: int
    ) -> Matter:
        """The frozen model's answers to the held-out problems, which go through it for their hidden states.

        A layer on `support` is read from their scalars, one on another support over the whole vocabulary.
        """
        examples = [Example(p, answer.token_ids) for p, answer in zip(ground.test.prompts, answers, strict=True)]
        tokens = run_backbone(ground.model, examples, batch_size, "hidden states of the answers")
        features = with_scalars(ground.head, tokens, support, "their base distribution")
        by_row = dict(enumerate(examples))
        return cls(
            ground.base, Text(features), "task", ground.task.name, examples=by_row, ground=ground, answers=answers
        )

    def marks(self, rho: float) -> Marks:
        """What divides the text. Raises UserError where it has no tokens."""
        return mark(self.text, vocabulary_classes(self.base.tokenizer, self.base.head.vocab_size), rho)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text."""
        return str(self.base.tokenizer.decode(list(token_ids)))
