"""Which worker has which part of a step; what a worker had that died, another one samples and is told anew.

A part is a function of its work, the step's first weights, and what was asked of it since. All that changes what a
worker keeps is written down, so that whoever takes a part over is brought to where the others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_bias.cluster.parts import Key, PartSamples, PartWork
from moe_bias.cluster.pool import LostError, Member, Pending, Pool
from moe_bias.cluster.weights import Row

_ADVICE = "lower `batch_size` or `max_new_tokens`, or give workers more memory"
Given = Callable[[Member, Sequence[Key]], tuple[Any, ...]]
"""What a worker is asked with, besides the parts of its that are meant."""


@dataclass
class Owners:
    """The parts of one step."""

    pool: Pool
    step: int
    start: Row
    _works: dict[Key, PartWork] = field(default_factory=dict)
    _owners: dict[Key, Member] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)
    _history: list[tuple[str, Given]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._works)

    def sample(self, works: Sequence[PartWork]) -> Iterator[tuple[Key, PartSamples]]:
        """Has parts sampled by whoever is idle, and gives what is told of them as it comes."""
        self._works |= {work.key: work for work in works}
        for key, member, found in self.pool.each([work.key for work in works], self._ask_sample, _about, _ADVICE):
            self._owners[key] = member
            yield key, found

    def ask(self, method: str, given: Given, keys: Sequence[Key] | None = None, remember: bool = False) -> list[Any]:
        """Asks the owners of the parts (None: of all), one call each; their answers in no order.

        `remember` what changes what a worker keeps. Raises UserError where workers die over it again and again.
        """
        left, found, losses = list(self._owners if keys is None else keys), list[Any](), 0
        while left:
            asked, left = self._asked(method, given, left), []
            for mine, pending in asked:
                try:
                    found.append(self.pool.answer(pending))
                except LostError as loss:
                    losses += 1
                    self.pool.refuse_losses(losses, f"{method!r} of step {self.step + 1}", _ADVICE, loss)
                    left += mine
            if left:
                self._recover()
        if remember:
            self._history.append((method, given))
        return found

    def _asked(self, method: str, given: Given, keys: Sequence[Key]) -> list[tuple[list[Key], Pending]]:
        """One call for each owner."""
        of_member: dict[int, tuple[Member, list[Key]]] = {}
        for key in keys:
            of_member.setdefault(self._owners[key].number, (self._owners[key], []))[1].append(key)
        return [
            (mine, self.pool.ask(member, method, mine, *given(member, mine))) for member, mine in of_member.values()
        ]

    def _recover(self) -> None:
        """Brings the parts of workers that are gone to where the others are, elsewhere."""
        there = {member.number for member in self.pool.members()}
        lost = [key for key, member in self._owners.items() if member.number not in there]
        for _ in self.sample([self._works[key] for key in lost]):
            pass
        for method, given in self._history:
            self.ask(method, given, lost)

    def _ask_sample(self, member: Member, key: Key) -> Pending:
        """The first part of a step brings the weights along."""
        row = None if member.number in self._begun else self.start
        self._begun.add(member.number)
        return self.pool.ask(member, "sample", self._works[key], self.step, row)


def _about(key: Key) -> str:
    return f"the samples of part {key[1] + 1} of a step's problems"
