"""Workers of a kind on a Ray cluster: started, asked, and replaced when they die.

What was asked of a worker that died is asked of another one. A node whose machine fails takes its workers with it, and
one that joins later may have some: whoever uses a pool looks for that by `refresh`. Several losses in a row over the
same piece of work are no accident, and are told.
"""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from moe_bias.cluster.connection import Node, connected, fit, nodes, uses_gpus, workers_on
from moe_bias.config import Cluster
from moe_bias.mistakes import UserError, reason_of
from moe_bias.progress import say, text_console

Unit = TypeVar("Unit", bound=Hashable)
MOST_LOSSES = 3
"""A piece of work over which so many workers have died is not tried again; nor is starting workers."""
_TOLD = (UserError, OSError, MemoryError)
"""What a worker raises that is no fault of the program, and is raised here as if it had come up here."""
_LOOK_SECONDS = 0.5
_PATIENCE = 600.0
"""Seconds without any worker after which a run ends."""
_START_SECONDS = 60.0
"""After as many, work begins with the workers that are there; others join when they are ready."""


class Worker:
    """Base of what a worker is: made of the pool's arguments, ready once `begin` has returned."""

    def begin(self, on_gpu: bool, cores: int, folder: str) -> None:
        """Loads what is needed; modules of the user's are imported from the folder, where this machine has it.

        Raises UserError, with this machine's name, where that cannot be had here.
        """
        torch.set_num_threads(cores)
        if os.path.isdir(folder):
            os.chdir(folder)
        try:
            self.load(on_gpu)
        except UserError as error:
            raise UserError(f"a worker on {platform.node()} cannot begin: {error}") from error

    def load(self, on_gpu: bool) -> None:
        """Gets what the work needs of the machine."""
        raise NotImplementedError


class LostError(Exception):
    """The worker that was asked has died, or its machine."""


@dataclass
class Traffic:
    """Bytes of what was asked and answered, as pickles, whatever Ray puts around them."""

    sent: int = 0
    received: int = 0

    def since(self, before: Traffic) -> int:
        """Bytes of both kinds since it was so."""
        return self.sent - before.sent + self.received - before.received


@dataclass(eq=False)
class Member:
    """A worker; `actor` is Ray's handle of it."""

    number: int
    actor: Any
    node: str = ""


@dataclass(eq=False)
class Pending:
    """What a worker was asked, until it has answered."""

    member: Member
    reference: Any


@dataclass(eq=False)
class Pool:
    """Use `opened`. `traffic` counts what went through it, calls of `begin` left out."""

    cluster: Cluster
    on_gpus: bool
    folder: Path | None
    console: Console
    make: Callable[[str], Any]
    traffic: Traffic = field(default_factory=Traffic)
    _members: list[Member] = field(default_factory=list)
    _starting: dict[Any, Member] = field(default_factory=dict)
    _fit: dict[str, bool] = field(default_factory=dict)
    _failed_starts: int = 0
    _made: int = 0
    _last_reason: str = ""
    _next_look: float = 0.0
    _last_had: float = field(default_factory=time.monotonic)

    def members(self) -> list[Member]:
        """The workers that are ready, in the order in which they were started."""
        if self._members:
            self._last_had = time.monotonic()
        return list(self._members)

    def begin(self) -> None:
        """Starts the workers. Raises UserError, naming the node, where one cannot do the work."""
        there = fit(nodes(), self.folder)
        self._fit = {node.id: True for node in there}
        self._start(there, workers_on(there, self.cluster, self.on_gpus))
        end = time.monotonic() + _START_SECONDS
        while self._starting and (time.monotonic() < end or not self.members()):
            self._look(_LOOK_SECONDS, at_start=True)

    def refresh(self, wait: float = 0.0) -> list[Member]:
        """Takes in workers that have become ready, starts others for those that died, and for nodes that joined.

        Waits so many seconds for a change where there is no worker at all. Raises UserError where none can be had.
        """
        self._look(0.0)
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            there = [node for node in nodes() if self._is_fit(node)]
            room = sum(node.workers(self.cluster, self.on_gpus) for node in there)
            asked = self.cluster.workers
            wanted = min(asked, room) if isinstance(asked, int) else room
            if self._failed_starts < MOST_LOSSES:
                self._start(there, wanted - len(self._members) - len(self._starting))
        if not self.members():
            self._wait(wait)
        return self.members()

    def _is_fit(self, node: Node) -> bool:
        """Whether a node that may have joined can do the work; one that cannot is told, and left alone."""
        if node.id not in self._fit:
            try:
                self._fit[node.id] = bool(fit([node], self.folder))
            except UserError as error:
                say(self.console, f"a node joined that is left out: {error}")
                self._fit[node.id] = False
        return self._fit[node.id]

    def _wait(self, seconds: float) -> None:
        """For a first worker."""
        if self._starting:
            self._look(seconds)
            return
        if self._failed_starts >= MOST_LOSSES:
            raise UserError(f"no worker is left, and new ones do not start: {self._last_reason}")
        if time.monotonic() - self._last_had > _PATIENCE:
            raise UserError(f"no node of the cluster has had room for a worker for {_PATIENCE / 60:.0f} minutes")
        time.sleep(seconds)

    def ask(self, member: Member, method: str, *given: Any) -> Pending:
        """Asks a worker; the answer is fetched by `answer`."""
        self.traffic.sent += _size(given)
        return Pending(member, getattr(member.actor, method).remote(*given))

    def answer(self, pending: Pending) -> Any:
        """What a worker answered; waits for it. Raises LostError where it died, and what it raised itself."""
        import ray

        try:
            found = ray.get(pending.reference)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, _TOLD) else error) from None
        except ray.exceptions.RayError as error:
            self._lose(pending.member, reason_of(error))
            raise LostError(self._last_reason) from error
        self.traffic.received += _size(found)
        return found

    def each(
        self,
        units: Sequence[Unit],
        ask: Callable[[Member, Unit], Pending],
        about: Callable[[Unit], str],
        advice: str,
    ) -> Iterator[tuple[Unit, Member, Any]]:
        """Has every unit done by whichever worker is idle, and gives results as they come.

        Raises UserError, with the advice, where workers die over one unit again and again.
        """
        waiting, running, losses = deque(units), dict[Any, tuple[Unit, Pending]](), Counter[Unit]()
        while waiting or running:
            busy = {pending.member.number for _, pending in running.values()}
            for member in self.refresh(_LOOK_SECONDS):
                if waiting and member.number not in busy:
                    unit = waiting.popleft()
                    pending = ask(member, unit)
                    running[pending.reference] = (unit, pending)
            for reference in self.done(list(running)):
                unit, pending = running.pop(reference)
                try:
                    found = self.answer(pending)
                except LostError as loss:
                    losses[unit] += 1
                    self.refuse_losses(losses[unit], about(unit), advice, loss)
                    waiting.appendleft(unit)
                else:
                    yield unit, pending.member, found

    def done(self, references: list[Any], wait: float = _LOOK_SECONDS) -> list[Any]:
        """One of those that have an answer, after so many seconds at most; none where there is none."""
        import ray

        found: list[Any] = ray.wait(references, num_returns=1, timeout=wait)[0] if references else []
        return found

    def refuse_losses(self, losses: int, what: str, advice: str, loss: LostError) -> None:
        """Raises UserError after too many losses over one piece of work."""
        if losses >= MOST_LOSSES:
            raise UserError(f"{what} ended {losses} workers one after the other ({reason_of(loss)}): {advice}")
        say(self.console, f"a worker died over {what}, which another one does again ({reason_of(loss)})")

    def close(self) -> None:
        """Ends the workers."""
        import ray

        for member in [*self._members, *self._starting.values()]:
            ray.kill(member.actor)

    def _start(self, there: Sequence[Node], count: int) -> None:
        """Starts so many, each on the node with the fewest workers that has room for one."""
        for _ in range(count):
            has = Counter(member.node for member in [*self._members, *self._starting.values()])
            free = [node for node in there if has[node.id] < node.workers(self.cluster, self.on_gpus)]
            if not free:
                return
            node = min(free, key=lambda node: has[node.id])
            self._made += 1
            member = Member(self._made, self.make(node.id), node.id)
            ready = member.actor.begin.remote(self.on_gpus, self.cluster.worker_cores, os.getcwd())
            self._starting[ready] = member

    def _look(self, wait: float, at_start: bool = False) -> None:
        """Takes in those that are ready."""
        import ray

        for reference in self.done(list(self._starting), wait):
            member = self._starting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, _TOLD) else error
                if at_start or not self.members():
                    raise cause from None
                say(self.console, f"a new worker cannot take part: {reason_of(cause)}")
                self._failed_starts += 1
                self._lose(member, reason_of(cause))
            except ray.exceptions.RayError as error:
                self._failed_starts += any(node.id == member.node for node in nodes())
                self._lose(member, reason_of(error))
            else:
                self._failed_starts = 0
                self._members.append(member)

    def _lose(self, member: Member, reason: str) -> None:
        import ray

        self._last_reason = reason
        self._members = [other for other in self._members if other is not member]
        ray.kill(member.actor)


@contextmanager
def opened(
    cluster: Cluster,
    kind: type[Worker],
    given: Sequence[Any],
    device: str,
    folder: Path | None = None,
    console: Console | None = None,
) -> Iterator[Pool]:
    """Workers of a kind, each made of what is given, while the block runs; all see the folder.

    `device` is 'cpu', 'auto' or a GPU's name. Raises UserError where Ray is not installed, no cluster answers, nodes
    have other versions or do not see the folder, there is no room for the workers, or one cannot begin.
    """
    with connected(cluster):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        on_gpus = uses_gpus(nodes(), device)
        actor, sizes = ray.remote(kind), {"num_cpus": cluster.worker_cores, "num_gpus": int(on_gpus)}

        def make(node: str) -> Any:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            return actor.options(**sizes, scheduling_strategy=there, max_restarts=0).remote(*given)

        pool = Pool(cluster, on_gpus, folder, console or text_console(), make)
        try:
            pool.begin()
            yield pool
        finally:
            pool.close()


def _size(value: Any) -> int:
    return len(pickle.dumps(value, protocol=5))
