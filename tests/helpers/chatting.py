"""An engine on a tiny model with two adapters, and what it wrote."""

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

import moe_bias as mb
from helpers.saved import save_adapter, save_model
from moe_bias.server.answer import Answering, Asked, Ended, Event, Failed, Written
from moe_bias.server.engine import Engine

WAIT = 60.0
"""Seconds after which an answer is taken not to come."""


def served_folder(folder: Path) -> tuple[mb.Frozen, Path]:
    """A tiny model, and a folder with the adapters `one` and `two` of it."""
    name = save_model(folder / "model")
    save_adapter(folder / "adapters" / "one", name)
    save_adapter(folder / "adapters" / "two", name, num_experts=2, top_k=1, support=None, entropy_gate=False)
    return mb.load(name, device="cpu"), folder / "adapters"


@contextmanager
def running_engine(base: mb.Frozen, adapters: Path | None, keeper: Any = None, **choices: Any) -> Iterator[Engine]:
    engine = Engine(base, adapters, keeper, **choices)
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Heard:
    """What an answer's listener was told."""

    answering: Answering | None = None
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    written: list[Written] = field(default_factory=list)
    end: Ended | Failed | None = None

    def wait(self) -> "Heard":
        """Until the answer is complete."""
        while self.end is None:
            self.next()
        return self

    def next(self) -> Event:
        event = self.events.get(timeout=WAIT)
        if isinstance(event, Written):
            self.written.append(event)
        else:
            self.end = event
        return event

    @property
    def text(self) -> str:
        assert isinstance(self.end, Ended), self.end
        return "".join(part.text for part in self.written) + self.end.text


def ask(engine: Engine, prompt: list[int], adapters: tuple[str, ...] = (), **choices: Any) -> Heard:
    """Begins an answer; `choices` are those of `Asked`."""
    heard = Heard()
    versions = {name: engine.version(name) for name in adapters}
    heard.answering = engine.submit(Asked(prompt, versions, **choices), heard.events.put)
    return heard


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The application on a port of its own, at this address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()


def asked(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of an answer; `body` is sent as JSON, or as it is where it is bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text.decode()
