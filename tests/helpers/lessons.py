"""Lessons of a tiny model, made of random hidden states."""

from pathlib import Path

import torch

from helpers.models import HIDDEN, tiny_model
from moe_bias.adapter import save_layer
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig, LearnConfig
from moe_bias.features.extract import Features, answer_features
from moe_bias.learning.journal import Entry
from moe_bias.learning.learner import LESSON, Learner
from moe_bias.learning.lessons import Lesson, pair_lesson, reward_lesson
from moe_bias.learning.process import Learners
from moe_bias.mistakes import UserError

SUPPORT = tuple(range(3, 70))
MODEL = tiny_model("llama-tied")
HEAD = find_head(MODEL)[1]
LIMIT = 512


def fresh_layer(**choices):
    config = LayerConfig(support=SUPPORT, num_experts=3, top_k=2, expert_rank=2, **choices)
    torch.manual_seed(0)
    return HEAD.layer(config)


def answer(tokens, seed=0) -> Features:
    """Features of one answer of these tokens; the hidden states follow from the seed and their place."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(len(tokens), HIDDEN, generator=generator)
    return answer_features(HEAD, hidden_TD, torch.tensor(tokens), torch.tensor(SUPPORT))


def edit(seed=0, length=6, wanted=5) -> Lesson:
    """The better answer is of one token alone, whatever the other one was; both begin alike."""
    generator = torch.Generator().manual_seed(100 + seed)
    other = torch.randint(20, 60, (length,), generator=generator).tolist()
    return pair_lesson(answer([7, *[wanted] * length], seed), answer([7, *other], seed), LIMIT)


def rewarded(value, seed=0, token=9, length=5) -> Lesson:
    return reward_lesson(answer([token] * length, seed), value, LIMIT)


def entry(number, lesson=None, event=LESSON, **header) -> Entry:
    """As a journal gives it."""
    if lesson is None:
        return Entry(number, event, header, {}, 0)
    return Entry(number, event, {"reward": lesson.reward, **header}, lesson.tensors(), 0)


def learner(**choices) -> Learner:
    """One that learns fast: the rows of a tiny model's output embedding are short."""
    return Learner(fresh_layer(), HEAD, LearnConfig(**{"expert_rate": 0.1, **choices}))


def taught(pupil, lessons, first=1):
    """The outcomes of lessons, one after the other."""
    return [pupil.apply(entry(number, lesson)) for number, lesson in enumerate(lessons, first)]


def contents(pupil):
    """Everything that the learner's bytes are in."""
    header, tensors = pupil.state()
    return header, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def save_start(folder: Path, name="mine") -> Path:
    """A fresh adapter in a folder of adapters, which is returned."""
    save_layer(fresh_layer(), folder / name, MODEL)
    return folder


class InlineWorker:
    """A worker whose process is the caller's own: nothing is pickled, and nobody waits for imports.

    One that `is_slow` begins paused, so that nothing is answered.
    """

    is_slow = False

    def __init__(self, arguments, listener):
        self.arguments, self._listener = arguments, listener
        self._learners = Learners(*arguments)
        self.paused = self.is_slow
        InlineWorker.newest = self

    def ask(self, kind, name):
        if self.paused:
            return
        try:
            found = self._learners.read_on(name) if kind == "read" else self._learners.checkpoint(name)
        except UserError as error:
            self._listener.replied((kind, name), None, str(error))
        else:
            self._listener.replied((kind, name), found, None)

    def kill(self):
        """All that was in memory is gone."""
        self._learners = Learners(*self.arguments)
        self._listener.restarted()

    def close(self):
        self._learners.close()
