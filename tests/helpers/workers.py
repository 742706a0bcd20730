"""Workers in this process in a cluster's place: calls are pickled, and any of them may end its worker."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_bias.cluster.pool import LostError, Member, Pending, Pool
from moe_bias.config import Cluster
from moe_bias.progress import text_console
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import Verdict, judged


class WorkersHere(Pool):
    """As many workers as are wanted. The calls of numbers in `deadly` end theirs; another one takes its place.

    `changes` may change how many there are, by the number of the call before which it happens. `calls` are those that
    were answered: the worker's number and the method.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        workers: int,
        deadly: set[int] = frozenset(),
        changes: dict[int, int] | None = None,
    ) -> None:
        super().__init__(Cluster(workers=workers), False, None, text_console(quiet=True), lambda node: make())
        self._wanted, self._deadly, self._changes = workers, set(deadly), dict(changes or {})
        self.calls: list[tuple[int, str]] = []
        self._asked = 0
        self.largest = 0
        self.refresh()

    def refresh(self, wait: float = 0.0) -> list[Member]:
        while len(self._members) < self._wanted:
            self._made += 1
            actor = self.make("")
            actor.load(False)
            self._members.append(Member(self._made, actor))
        return list(self._members)

    def ask(self, member: Member, method: str, *given: Any) -> Pending:
        sent = pickle.dumps(given, protocol=5)
        self.traffic.sent += len(sent)
        self.largest = max(self.largest, len(sent))
        self._asked += 1
        return Pending(member, (self._asked, method, sent))

    def answer(self, pending: Pending) -> Any:
        number, method, sent = pending.reference
        self._wanted = self._changes.pop(number, self._wanted)
        if pending.member not in self._members:
            raise LostError("it was gone")
        if number in self._deadly:
            self._members.remove(pending.member)
            raise LostError(f"call {number} was deadly")
        self.calls.append((pending.member.number, method))
        found = pickle.dumps(getattr(pending.member.actor, method)(*pickle.loads(sent)), protocol=5)
        self.traffic.received += len(found)
        self.largest = max(self.largest, len(found))
        return pickle.loads(found)

    def done(self, references: list[Any], wait: float = 0.0) -> list[Any]:
        """The last asked is first to answer."""
        return references[-1:]


@dataclass(frozen=True)
class LettersTask:
    """Asks for words with a 1 in them, which a random model writes now and then."""

    name: str = "letters"

    def problems(self, count: int, seed: int) -> list[Problem]:
        return [Problem(f"w{5 + n} w6" + " w7" * (n % 4), f"gold {n}") for n in range(count)]

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        return [judged(text.count("1") > 1, text) for text in completions]


def share_of_ones(prompt: str, completion: str, gold: str) -> float:
    return sum("1" in word for word in completion.split()) / max(len(completion.split()), 1)
