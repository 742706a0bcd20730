"""What a server holds: the answers that may be taught, the journals, and the process that learns.

A lesson is acknowledged when it is in its adapter's journal and on the disk. The process is told then; where it ends,
whatever ended it, another one is started and told of every adapter again, which does no harm: an entry is applied once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

from moe_bias.adapter.embedding import embedding_sample
from moe_bias.backbone import Head
from moe_bias.config import LearnConfig, SpoolLimits
from moe_bias.learning.journal import CONFIG, STATE, Journal, first_header
from moe_bias.learning.learner import HISTORY, LESSON, written
from moe_bias.learning.lessons import Lesson
from moe_bias.learning.process import CHECKPOINT, JOURNAL, START, Place, write_head
from moe_bias.learning.published import Published
from moe_bias.learning.spool import Spool
from moe_bias.learning.worker import Request, Worker
from moe_bias.mistakes import UserError, reason_of, shown
from moe_bias.serving.versions import adapter_names, check_made_on

MEMORY = 2**30
"""What the learners that are loaded may take."""
_PATIENCE = 60.0
"""Seconds that a history waits for the process, which begins with all adapters."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_log = logging.getLogger(__name__)
Told = Future[dict[str, Any]]
"""What became of an entry, as `Outcome` has it, with `milliseconds` that the update took."""


class LearningStoppedError(RuntimeError):
    """Nothing more is learned until the server is started again; what was acknowledged is in the journals."""


@dataclass
class _Taught:
    """An adapter that learns: its journal, who waits for which entry, and what became of the last ones.

    `heard` is set once the process has told of all that was in the journal when the server began.
    """

    journal: Journal
    heard: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)
    waiting: dict[int, Told] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        """Tells everyone who waits."""
        self.heard.set()
        with self.lock:
            waiting, self.waiting = self.waiting, {}
        for future in waiting.values():
            sentence = f"{reason}; what was told is kept, and applied when this adapter learns again"
            future.set_exception(LearningStoppedError(sentence))


class Learning:
    """Adapters that learn while they are served; for any thread.

    Everything is kept under `root`; the folder `adapters` that the server is to serve from is made there, of links to
    the adapters in `given`, which are never written to.
    """

    def __init__(
        self,
        root: Path,
        given: Path,
        head: Head,
        config: LearnConfig,
        limits: SpoolLimits | None = None,
        memory: int = MEMORY,
    ) -> None:
        """Raises UserError where `given` is no folder, or a journal is damaged."""
        if not given.is_dir():
            raise UserError(f"{str(given)!r}, where adapters are to be served from, is not a folder")
        self.config, self.spool = config, Spool(limits or SpoolLimits())
        self._config = written(config)
        self._place, self._published = Place(root), Published(root)
        self._sample = embedding_sample(head.rows, head.hidden_size, head.vocab_size)
        write_head(head, self._place.head)
        self._taught: dict[str, _Taught] = {}
        self._lock, self._stopped = Lock(), ""
        for name in adapter_names(given):
            self.begin(name, given / name)
        for folder in sorted((root / "journals").glob(f"*/{JOURNAL}")):
            self._open(folder.parent.name)
        self._worker = Worker((self._place, head.transform, config, memory), self)
        self.restarted()

    @property
    def adapters(self) -> Path:
        """The folder to serve from."""
        return self._published.names

    @property
    def process(self) -> int | None:
        """The number of the process that learns now."""
        return self._worker.pid

    def begin(self, name: str, start: Path) -> None:
        """Serves an adapter, of which this is the first version. Does nothing where the name is known already.

        Raises UserError on a name that is none for a folder, and on an adapter of another model.
        """
        if not _PLAIN_NAME.fullmatch(name):
            raise UserError(
                f"{shown(name)} is no name of an adapter that learns; use letters, digits, '.', '_' and '-'"
            )
        check_made_on(start, self._sample)
        self._published.begin(name, start)
        folder = self._place.of(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / START).is_symlink():
            (folder / START).symlink_to(start.resolve(), target_is_directory=True)

    def teach(self, name: str, lesson: Lesson) -> Told:
        """Takes a lesson: it is on the disk when this returns, and the future has what became of it, in the end.

        Raises UserError on an adapter that is not there, OSError where the disk does not take it, and
        LearningStoppedError where nothing is learned any more.
        """
        return self.tell(name, LESSON, {"reward": lesson.reward}, lesson)

    def tell(
        self, name: str, event: str, header: Mapping[str, Any] | None = None, lesson: Lesson | None = None
    ) -> Told:
        """Writes an event into an adapter's journal: see `teach`."""
        if self._stopped:
            raise LearningStoppedError(f"{self._stopped}; start the server again")
        taught = self._of(name)
        future: Told = Future()
        future.set_running_or_notify_cancel()  # whoever waits may go; nobody can call off what is written down
        with taught.lock:
            new = {} if taught.journal.config == self._config else {CONFIG: self._config}
            tensors = None if lesson is None else lesson.tensors()
            number = taught.journal.append(event, {**(header or {}), **new}, tensors)
            taught.waiting[number] = future
        self._worker.ask("read", name)
        return future

    def changes(self) -> dict[str, list[str]]:
        """By adapter, each setting that what it is told next is learned with, and all before was not."""
        return {
            name: [
                f"{field} {value} in place of {before[field]}" if field in before else f"{field} {value}"
                for field, value in self._config.items()
                if before.get(field) != value
            ]
            for name, taught in self._taught.items()
            if (before := taught.journal.config) not in (None, self._config)
        }

    def said_changes(self) -> list[str]:
        """The same as sentences, one for each adapter."""
        return [
            f"What {name!r} is told from now on is learned with {', '.join(changed)}."
            for name, changed in self.changes().items()
        ]

    def history(self, name: str) -> list[dict[str, Any]]:
        """What became of the last entries, the oldest first; after a start it waits until they are known.

        Raises UserError on an adapter that is not there, and LearningStoppedError where that takes too long.
        """
        taught = self._of(name)
        if not taught.heard.wait(_PATIENCE):
            raise LearningStoppedError(f"what the adapter {name!r} was told is still being read; ask again later")
        return list(taught.history)

    def close(self) -> None:
        """Ends the process, after it has written down what it holds."""
        self._worker.close()
        self._fail_all("the server was stopped")
        for taught in self._taught.values():
            taught.journal.close()

    def replied(self, request: Request, found: Any, failure: str | None) -> None:
        """Takes a reply of the process."""
        kind, name = request
        taught = self._taught[name]
        if failure is not None:
            _log.error("the adapter %r does not learn: %s", name, failure)
            taught.fail(f"the adapter {name!r} does not learn ({failure})")
        elif kind == "read":
            self._tell_outcomes(name, taught, found)
        else:
            self._cut(name, taught, found)

    def restarted(self) -> None:
        """Tells a new process of every adapter."""
        for name in list(self._taught):
            self._worker.ask("read", name)

    def given_up(self, reason: str) -> None:
        """Nothing more is learned."""
        _log.error("%s; nothing more is learned", reason)
        self._stopped = reason
        self._fail_all(reason)

    def _of(self, name: str) -> _Taught:
        with self._lock:
            if name not in self._taught:
                if name not in adapter_names(self.adapters):
                    raise UserError(f"there is no adapter {shown(name)} on this server")
                self._open(name)
            return self._taught[name]

    def _open(self, name: str) -> None:
        folder = self._place.of(name)
        if not (folder / START).exists():
            raise UserError(
                f"the adapter {name!r} has learned under {str(folder)!r}, but what it began as is gone: bring back "
                f"{str((folder / START).readlink())!r}, or remove the folder to forget what it learned"
            )
        taught = _Taught(Journal(folder / JOURNAL), history=_told(folder))
        if taught.journal.last == 0:
            taught.heard.set()
        self._taught[name] = taught

    def _tell_outcomes(self, name: str, taught: _Taught, outcomes: list[dict[str, Any]]) -> None:
        self._fail_unknown(taught, outcomes)
        for outcome in outcomes:
            if not taught.history or outcome["number"] > taught.history[-1]["number"]:
                told = {name: value for name, value in outcome.items() if name != "milliseconds"}
                taught.history = [*taught.history, told][-HISTORY:]
            with taught.lock:
                future = taught.waiting.pop(outcome["number"], None)
            if future is not None:
                future.set_result(outcome)
        taught.heard.set()
        if taught.waiting:  # that came while the process was answering
            self._worker.ask("read", name)
        if outcomes and taught.journal.grown > self.config.journal_size:
            self._worker.ask("checkpoint", name)

    def _fail_unknown(self, taught: _Taught, outcomes: list[dict[str, Any]]) -> None:
        """Tells who waits for what comes before the first outcome: it was applied, by a process that was killed then,
        and so many came after it that its outcome is not in the state.
        """
        with taught.lock:
            first = outcomes[0]["number"] if outcomes else 0
            unknown = [taught.waiting.pop(number) for number in list(taught.waiting) if number < first]
        for future in unknown:
            future.set_exception(LearningStoppedError("it was applied once, and what became of it is not known"))

    def _cut(self, name: str, taught: _Taught, through: int) -> None:
        """The state takes the place of all that it holds; what has come since stays after it."""
        try:
            with taught.lock:
                taught.journal.begin_anew(self._place.of(name) / CHECKPOINT, through)
        except OSError as error:  # it is as it was, and goes on growing
            _log.warning("the journal of the adapter %r could not be cut: %s", name, reason_of(error))

    def _fail_all(self, reason: str) -> None:
        for taught in list(self._taught.values()):
            taught.fail(reason)


def _told(folder: Path) -> list[dict[str, Any]]:
    """The history in the last state that was written down, as a checkpoint or at the beginning of a journal."""
    for path in (folder / CHECKPOINT, folder / JOURNAL):
        header = first_header(path) if path.exists() else {}
        if header.get("event") == STATE:
            return list(header["history"])
    return []
