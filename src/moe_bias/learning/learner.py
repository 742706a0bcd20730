"""The learner of one adapter: a state that follows from the entries of its journal in their order, and nothing else.

With which config an entry is applied is said in the journal too, by the first entry that it is for.

Each lesson is learned once with a few earlier ones, or kept to measure by. What an update makes of the layer becomes
the next version where it is within its bounds and does not make the lessons worse that it is measured by; else layer
and moments are put back, and the lesson stays to be replayed. `undo` goes back to the version before, and forgets the
lessons since. No clock and no random device is read, so that the same entries give the same bytes.

Shapes: M support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import LearnConfig
from moe_bias.features.grown import grown
from moe_bias.layer import MoEBiasLayer
from moe_bias.learning.journal import CONFIG, STATE, Entry
from moe_bias.learning.lessons import Batch, Lesson
from moe_bias.learning.update import Measured, update
from moe_bias.mistakes import UserError
from moe_bias.training.batches import mixed_seed
from moe_bias.training.optimisation import Optimisation

LESSON, UNDO, FREEZE, UNFREEZE = "lesson", "undo", "freeze", "unfreeze"
HISTORY = 200
"""Outcomes that a state tells of, the last."""


@dataclass(frozen=True)
class Outcome:
    """What became of an entry. `version` is the one served from now on; KL in nats a token, None without an update.

    `applied` tells whether it was learned from, `published` whether a new version came of it, `reason` why not.
    `loss_before` and `loss_after` are on the lessons to measure by, in nats, None where there are none.
    """

    number: int
    event: str
    version: int
    applied: bool = False
    published: bool = False
    reason: str = ""
    step_kl: float | None = None
    base_kl: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass
class _Kept:
    """Lessons by the number of their entry, the oldest first, at most `limit`; those of a number above can go."""

    limit: int
    lessons: dict[int, Lesson] = field(default_factory=dict)

    def add(self, number: int, lesson: Lesson) -> None:
        self.lessons[number] = lesson
        self.drop_old()

    def drop_old(self) -> None:
        """Those beyond the limit go."""
        while len(self.lessons) > self.limit:
            del self.lessons[next(iter(self.lessons))]

    def forget_after(self, number: int) -> None:
        self.lessons = {kept: lesson for kept, lesson in self.lessons.items() if kept <= number}


@dataclass(frozen=True)
class _Version:
    """A version that can be gone back to: the layer's tensors, and the last entry that it has learned from."""

    number: int
    through: int
    support: tuple[int, ...] | None
    tensors: dict[str, Tensor]


class Learner:
    """One adapter's layer, moments and lessons."""

    def __init__(self, layer: MoEBiasLayer, head: Head, config: LearnConfig) -> None:
        """`layer` is the adapter as it was at first, of which a copy has been made; it is changed.

        `config` is that of entries before the first that says another.
        """
        self.layer, self.through, self.version, self.frozen = layer.requires_grad_(True), 0, 0, False
        self.history: list[Outcome] = []
        self._head, self._config = head, config
        self._optimisation = Optimisation(layer, config, config.passes)
        self._lessons, self._rewards = 0, 0
        self._mean_reward = 0.0
        self._replayed, self._held_out = _Kept(config.kept_lessons), _Kept(config.held_out_lessons)
        self._measured: tuple[object, Measured] | None = None
        self._line = [_Version(0, 0, layer.config.support, self._tensors())]

    def apply(self, entry: Entry) -> Outcome | None:
        """What becomes of the next entry; None of one that was applied before."""
        if entry.event == STATE and entry.number > self.through:
            self._set_state(entry)
            return None
        if entry.number <= self.through:
            return None
        assert entry.number == self.through + 1, "the journal lacks an entry"
        self._learn_with(entry.header)
        outcome = self._applied(entry)
        self.through = entry.number
        self.history = [*self.history, outcome][-HISTORY:]
        return outcome

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are its own."""
        measured = [] if self._measured is None else [self._measured[1].logits]
        return sum(tensor.nbytes for tensor in [*self._held().values(), *self.layer.parameters(), *measured])

    def _applied(self, entry: Entry) -> Outcome:
        if entry.event == LESSON:
            return self._taught(entry)
        if entry.event == UNDO:
            return self._undone(entry)
        if entry.event in (FREEZE, UNFREEZE):
            self.frozen = entry.event == FREEZE
            return Outcome(entry.number, entry.event, self.version)
        raise UserError(f"the journal holds an event {entry.event!r}, which this version of the package does not know")

    def _learn_with(self, header: Mapping[str, Any]) -> None:
        """Takes the config that a header says, if it says one. Moments are kept where the optimiser has the same."""
        if CONFIG not in header:
            return
        moments, before = self._optimisation.tensors(), self._config
        self._config = config = LearnConfig(**header[CONFIG])
        self._optimisation = Optimisation(self.layer, config, config.passes)
        experts = self.layer.config.experts
        if config.optimizer_of(experts) == before.optimizer_of(experts):
            self._optimisation.load_tensors(moments)
        for kept, limit in ((self._replayed, config.kept_lessons), (self._held_out, config.held_out_lessons)):
            kept.limit = limit
            kept.drop_old()
        self._measured = None  # which tokens of a rewarded answer count is of the config too

    def _taught(self, entry: Entry) -> Outcome:
        lesson = Lesson.of(entry.tensors, self.layer.vocab_size, entry.header.get("reward"))
        self._lessons += 1
        not_learned = Outcome(entry.number, entry.event, self.version)
        if self._lessons % self._config.held_out_every == 0:
            self._held_out.add(entry.number, lesson)
            return replace(not_learned, reason="kept to measure by")
        baseline = self._mean_reward
        if lesson.reward is not None:
            self._rewards += 1
            self._mean_reward += (lesson.reward - self._mean_reward) / self._rewards
        if self.frozen:
            self._replayed.add(entry.number, lesson)
            return replace(not_learned, reason="the adapter is frozen")
        outcome = self._learned(entry, [lesson, *self._chosen(entry.number)], baseline)
        self._replayed.add(entry.number, lesson)
        return outcome

    def _chosen(self, number: int) -> list[Lesson]:
        """Earlier lessons to learn again, drawn by the entry's number."""
        lessons = list(self._replayed.lessons.values())
        generator = torch.Generator().manual_seed(mixed_seed(self._config.seed, number))
        order = torch.randperm(len(lessons), generator=generator)[: self._config.replay]
        return [lessons[place] for place in order.tolist()]

    def _learned(self, entry: Entry, lessons: list[Lesson], baseline: float) -> Outcome:
        moments = {name: tensor.clone() for name, tensor in self._optimisation.tensors().items()}
        self._reach(lessons)
        measured, held_out = self._on_support(lessons), self._held_out_measured()
        transform = self._head.transform
        change = update(self.layer, self._optimisation, measured, transform, self._config, baseline, held_out)
        if change.refused:
            self._put_back(self._line[-1], moments)
        else:
            self._publish(entry.number)
        self.layer.forget_derived()
        return Outcome(
            entry.number,
            entry.event,
            self.version,
            applied=True,
            published=not change.refused,
            reason=change.refused,
            step_kl=change.step_kl,
            base_kl=change.base_kl,
            loss_before=change.loss_before,
            loss_after=change.loss_after,
        )

    def _publish(self, number: int) -> None:
        self.version += 1
        self._line.append(_Version(self.version, number, self.layer.config.support, self._tensors()))
        del self._line[: -self._config.undo_depth - 1]

    def _undone(self, entry: Entry) -> Outcome:
        """The version before becomes a new one; its moments begin anew."""
        if len(self._line) == 1:
            return Outcome(entry.number, entry.event, self.version, reason="there is no version to go back to")
        self._line.pop()
        before = self._line[-1]
        self._put_back(before, {})
        self._replayed.forget_after(before.through)
        self._held_out.forget_after(before.through)
        self.version += 1
        return Outcome(entry.number, entry.event, self.version, published=True)

    def _held_out_measured(self) -> Measured | None:
        """The lessons to measure by, whose base logits are kept as long as lessons and support are the same."""
        lessons = self._held_out.lessons
        if not lessons:
            return None
        key = (tuple(lessons), self.layer.config.support)
        if self._measured is None or self._measured[0] != key:
            self._measured = key, self._on_support(list(lessons.values()))
        return self._measured[1]

    def _reach(self, lessons: Sequence[Lesson]) -> None:
        """Adds the lessons' tokens to the support: an adapter is to learn words that nobody thought of."""
        if not self.layer.can_change_support:
            return
        support = self.layer.config.support
        assert support is not None
        known = set(support)
        coming = sorted({token for lesson in lessons for token in lesson.features.token.tolist()} - known)
        if coming:
            self.layer.change_support([*support, *coming])

    def _on_support(self, lessons: Sequence[Lesson]) -> Measured:
        """Lessons as a batch on the layer's support, which holds all that they were served with."""
        support_M = self.layer.support_or_all().cpu()
        fitted = [replace(lesson, features=grown(lesson.features, self._head, support_M)) for lesson in lessons]
        return Measured.of(Batch.of(fitted, self._config.rho), self._head)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.layer.named_parameters()}

    def _put_back(self, version: _Version, moments: Mapping[str, Tensor]) -> None:
        if version.support != self.layer.config.support:
            assert version.support is not None
            self.layer.change_support(version.support)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter.copy_(version.tensors[name])
        self._optimisation.load_tensors(dict(moments))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All of it as JSON values and tensors, for a journal's entry of event `STATE`."""
        header = {
            CONFIG: written(self._config),
            "version": self.version,
            "frozen": self.frozen,
            "lessons": self._lessons,
            "rewards": self._rewards,
            "mean_reward": self._mean_reward,
            "history": [asdict(outcome) for outcome in self.history],
            "line": [[version.number, version.through, version.support] for version in self._line],
            "replayed": {str(number): lesson.reward for number, lesson in self._replayed.lessons.items()},
            "held_out": {str(number): lesson.reward for number, lesson in self._held_out.lessons.items()},
        }
        return header, self._held()

    def _held(self) -> dict[str, Tensor]:
        """The tensors of its state, by their names there."""
        tensors = dict(self._optimisation.tensors())
        for version in self._line:
            tensors |= {f"line.{version.number}.{name}": tensor for name, tensor in version.tensors.items()}
        for number, lesson in (self._replayed.lessons | self._held_out.lessons).items():
            tensors |= {f"lesson.{number}.{name}": tensor for name, tensor in lesson.tensors().items()}
        return tensors

    def _set_state(self, entry: Entry) -> None:
        header, tensors = entry.header, entry.tensors
        self._learn_with(header)
        self.through, self.version, self.frozen = entry.number, header["version"], header["frozen"]
        self._lessons, self._rewards = header["lessons"], header["rewards"]
        self._mean_reward = header["mean_reward"]
        self.history = [Outcome(**outcome) for outcome in header["history"]]
        self._line = [
            _Version(number, through, support and tuple(support), _under(tensors, f"line.{number}."))
            for number, through, support in header["line"]
        ]
        for kept, name in ((self._replayed, "replayed"), (self._held_out, "held_out")):
            kept.lessons = {
                int(number): Lesson.of(_under(tensors, f"lesson.{number}."), self.layer.vocab_size, reward)
                for number, reward in header[name].items()
            }
        self._put_back(self._line[-1], tensors)


def written(config: LearnConfig) -> dict[str, Any]:
    """A config as an entry's header has it: what the adapter follows from."""
    return config.model_dump(mode="json", exclude={"journal_size"})


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
