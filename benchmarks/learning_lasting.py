"""Half an hour of everything at once: is all that a server acknowledged kept, applied once, and answered with?

A real server (`moe-bias chat --learn`) over HTTP. Clients hold tenants of their own and ask, go away in mid-answer,
edit, reward, prefer, undo, freeze, read histories and make mistakes, in random order. Meanwhile the server is killed
and started again, and so is the process that learns. Each tenant keeps a book of what it was told.

    book        every acknowledged event has its number and outcome in the history, which counts on from 1; events
                beyond them are no more than the requests that a kill left without a reply; the journal holds the
                texts and rewards that were sent
    answers     greedy answers, token by token, against the published adapter applied by the library itself: no other
                token's logit is more than `CLOSE` above
    others      an adapter that nobody teaches is as it was, and refused to a key that is not its own
    memory      of both processes: slope over the longest time between two kills, after a third of it

    python benchmarks/learning_lasting.py --seconds 1800 --output records/learning/lasting.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import theilslopes

from learning_load import CITIES, KEY, WORDS, Server
from moe_bias.api.adapters import load_layer
from moe_bias.backbone import adapted_logits
from moe_bias.frozen import Frozen, load
from moe_bias.layer import entropy_from_logits
from moe_bias.learning.journal import entries
from moe_bias.learning.process import JOURNAL
from moe_bias.records import provenance, write_json
from moe_bias.server.prefixes import extended
from moe_bias.tasks.conversations import Conversation, encode_prompt

CLOSE = 0.01
"""Logits of tokens that are as good as alike: in a batch the model rounds otherwise than alone."""
UNTAUGHT, FOREIGN = "nobodys", "anothers"
TOKENS = 16
ACTIONS = {
    "ask": 6, "check": 2, "leave": 2, "edit": 6, "reward": 3, "prefer": 2, "undo": 1, "freeze": 1, "unfreeze": 2,
    "history": 2, "mistake": 1,
}  # fmt: skip
GONE = (OSError, http.client.HTTPException)
"""What a client sees of a server that is killed."""


@dataclass
class Tenant:
    """What it asked for last, and its book: events by their number, and those that no reply came to."""

    name: str
    asked: list[tuple[str, str]] = field(default_factory=list)
    told: dict[int, dict[str, Any]] = field(default_factory=dict)
    unknown: list[dict[str, Any]] = field(default_factory=list)

    def faults(self, events: list[dict[str, Any]]) -> list[str]:
        """What the history has that the book has not, or otherwise."""
        numbers = [event["number"] for event in events]
        found = [] if numbers == list(range(1, len(events) + 1)) else [f"{self.name}: the history counts {numbers}"]
        for number, sent in self.told.items():
            if number > len(events):
                found.append(f"{self.name}: {number} was acknowledged and is not in the history")
                continue
            event, reply = events[number - 1], sent["reply"]
            if any(event[name] != reply[name] for name in ("event", "version", "applied", "published")):
                found.append(f"{self.name}: {number} is {event} in the history, and was told as {reply}")
        if len(events) - len(self.told) > len(self.unknown):
            found.append(f"{self.name}: {len(events)} events of {len(self.told)} told, {len(self.unknown)} unknown")
        return found

    def faults_in_journal(self, path: Path, spell: Callable[[list[int]], str]) -> list[str]:
        """What is written down otherwise than it was sent."""
        found = []
        for entry in entries(path):
            sent = self.told.get(entry.number)
            if sent is None:
                continue
            if entry.event != sent["event"] or entry.header.get("reward") != sent.get("reward"):
                found.append(f"{self.name}: {entry.number} is written down as {entry.event} {dict(entry.header)}")
            elif "edit" in sent:
                text = spell(entry.tensors["token"][entry.tensors["answer"] == 0].tolist())
                if text != sent["edit"]:
                    found.append(f"{self.name}: {entry.number} is {text!r} in the journal, not {sent['edit']!r}")
        return found


class House:
    """The server's process, killed and started again; `is_up` is set while it answers."""

    def __init__(self, model: str, tenants: list[str], folder: Path, port: int) -> None:
        keys = folder / "keys.json"
        keys.write_text(json.dumps({KEY: [*tenants, UNTAUGHT], "a-key-of-somebody-else": [FOREIGN]}))
        self.root, self._log = folder / "learned", folder / "server.log"
        self._words = ["chat", "--model", model, "--learn", str(self.root), "--key-file", str(keys)]
        self._words += ["--port", str(port), "--served-name", "base"]
        self.address, self.is_up = f"http://127.0.0.1:{port}", threading.Event()
        self.memory: list[list[dict[str, Any]]] = []
        self._process, self.server = self._begun()

    def _begun(self) -> tuple[subprocess.Popen[bytes], Server]:
        with self._log.open("a") as log:
            words = [sys.executable, "-m", "moe_bias", *self._words]
            process = subprocess.Popen(words, stderr=log, stdout=log)
        server = Server(self.address, process.pid)
        while process.poll() is None:
            try:
                server.get("/health")
                break
            except GONE:
                time.sleep(0.5)
        assert process.poll() is None, self._log.read_text()
        self.memory.append([])
        self.is_up.set()
        return process, server

    def kill(self) -> None:
        """Kills the server as a power cut would, and starts it again."""
        self.is_up.clear()
        self._process.kill()
        self._process.wait()
        self._process, self.server = self._begun()

    def kill_learner(self) -> None:
        """Kills the process that learns."""
        if learner := self.server.learner():
            os.kill(learner, signal.SIGKILL)

    def look(self) -> None:
        """Notes the memory of both processes."""
        self.memory[-1].append({"at": time.time(), **self.server.memory()})

    def stop(self) -> None:
        """Ends it as its user would."""
        self._process.terminate()
        self._process.wait(120)


class Client:
    """One thread's tenants, what it does to them, and what it found to be wrong."""

    def __init__(self, house: House, tenants: list[Tenant], judge: Judge, seed: int) -> None:
        self._house, self._tenants, self._judge, self._random = house, tenants, judge, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def work(self, stopped: threading.Event) -> None:
        """Until it is stopped."""
        while not stopped.is_set():
            if not self._house.is_up.wait(0.2):
                continue
            tenant = self._random.choice(self._tenants)
            action = self._random.choices(list(ACTIONS), list(ACTIONS.values()))[0]
            try:
                getattr(self, f"_{action}")(tenant)
                self.counts[action] += 1
            except GONE as error:
                if isinstance(error, urllib.error.HTTPError | TimeoutError):  # it is there, and fails
                    self.faults.append(f"{tenant.name}, {action}: {error!r}")
                    continue
                self.counts["cut off"] += 1
                time.sleep(0.5)
            except Exception as error:
                self.faults.append(f"{tenant.name}, {action}: {error!r}")

    def _ask(self, tenant: Tenant) -> None:
        question = f"Say something about {self._random.choice(CITIES)} and the number {self._random.randrange(1000)}."
        reply = self._house.server.send("/v1/chat/completions", asking(tenant.name, question, temperature=0.7))
        tenant.asked = [*tenant.asked, (reply["id"], question)][-4:]

    def _check(self, tenant: Tenant) -> None:
        """A greedy answer is the published adapter's."""
        question = f"What is {self._random.randrange(100)} plus {self._random.randrange(100)}?"
        self.faults += self._judge.faults(self._house, tenant.name, question)

    def _leave(self, tenant: Tenant) -> None:
        """Goes away in the middle of an answer."""
        body = {**asking(tenant.name, "Tell a long story.", temperature=0.7), "max_tokens": 200, "stream": True}
        with self._house.server.open("/v1/chat/completions", body) as response:
            response.readline()

    def _edit(self, tenant: Tenant) -> None:
        text = f"{tenant.name} says {self._random.choice(WORDS)} {self._random.choice(WORDS)}."
        self._teach(tenant, {"edit": text})

    def _reward(self, tenant: Tenant) -> None:
        self._teach(tenant, {"reward": self._random.choice((1.0, 0.25, -0.5))})

    def _prefer(self, tenant: Tenant) -> None:
        """Of two answers to one question that differ, the second."""
        question = f"Name a colour, for {self._random.randrange(1000)}."
        body = asking(tenant.name, question, temperature=1.0)
        first, second = (self._house.server.send("/v1/chat/completions", body) for _ in range(2))
        texts = [reply["choices"][0]["message"]["content"] for reply in (first, second)]
        if texts[0] != texts[1]:
            self._tell(tenant, "/v1/feedback", {"id": first["id"], "prefer": second["id"]}, {"event": "lesson"})

    def _teach(self, tenant: Tenant, what: dict[str, Any]) -> None:
        if tenant.asked:
            identity = self._random.choice(tenant.asked)[0]
            self._tell(tenant, "/v1/feedback", {"id": identity, **what}, {"event": "lesson", **what})

    def _undo(self, tenant: Tenant) -> None:
        self._tell(tenant, f"/v1/adapters/{tenant.name}/undo", {}, {"event": "undo"})

    def _freeze(self, tenant: Tenant) -> None:
        self._tell(tenant, f"/v1/adapters/{tenant.name}/freeze", {}, {"event": "freeze"})

    def _unfreeze(self, tenant: Tenant) -> None:
        self._tell(tenant, f"/v1/adapters/{tenant.name}/unfreeze", {}, {"event": "unfreeze"})

    def _tell(self, tenant: Tenant, path: str, body: dict[str, Any], sent: dict[str, Any]) -> None:
        tenant.unknown.append(sent)
        try:
            reply = self._house.server.send(path, body)
        except urllib.error.HTTPError as error:
            sentence = json.load(error)["error"]["message"]
            if error.code == 404 and "no answer" in sentence:  # it was asked before the server was killed
                tenant.unknown.remove(sent)
                tenant.asked = []
            elif error.code != 503:  # the server was stopped, and keeps what it was told
                raise RuntimeError(f"{error.code} {sentence}") from error
            return
        tenant.unknown.remove(sent)
        if reply["feedback"] in tenant.told:
            self.faults.append(f"{tenant.name}: two events are number {reply['feedback']}")
        tenant.told[reply["feedback"]] = {**sent, "reply": reply}

    def _history(self, tenant: Tenant) -> None:
        try:
            events = self._house.server.get(f"/v1/adapters/{tenant.name}/history")["events"]
        except urllib.error.HTTPError as error:
            if error.code != 503:  # the process has not read all journals since the server was started
                raise
            self.counts["history later"] += 1
        else:
            self.faults += tenant.faults(events)

    def _mistake(self, tenant: Tenant) -> None:
        """Each is refused in a sentence, and changes nothing."""
        identity = tenant.asked[-1][0] if tenant.asked else "chatcmpl-none"
        mistakes = [
            ("/v1/feedback", {"id": identity, "reward": 7}),
            ("/v1/feedback", {"id": identity, "edit": "  "}),
            ("/v1/feedback", {"id": "chatcmpl-none", "reward": 1}),
            (f"/v1/adapters/{FOREIGN}/undo", {}),
        ]
        path, body = self._random.choice(mistakes)
        try:
            found = self._house.server.send(path, body)
        except urllib.error.HTTPError as error:
            if error.code not in (400, 404):
                raise
        else:
            self.faults.append(f"{path} took {body}: {found}")


class Judge:
    """The library itself, on the published files."""

    def __init__(self, base: Frozen) -> None:
        self._base, self._lock = base, threading.Lock()
        self.tokens = 0

    def faults(self, house: House, name: str, question: str) -> list[str]:
        """Tokens of a greedy answer that are not the likeliest."""
        body = {**asking(name, question, temperature=0.0), "moe_bias_numbers": True}
        published = house.root / "adapters" / name
        before = published.resolve()
        reply = house.server.send("/v1/chat/completions", body)
        tokens = [token["id"] for token in reply["moe_bias"]]
        with self._lock, torch.no_grad():
            base, layer = self._base, load_layer(published, self._base)
            turns = ({"role": "user", "content": question},)
            prompt = encode_prompt(Conversation(turns, "", is_chat=True), base.tokenizer)
            hidden_TD = extended(base.model, None, [*prompt, *tokens[:-1]]).hidden[len(prompt) - 1 :]
            logits_TV = base.head.logits(hidden_TD)
            entropy_T = entropy_from_logits(logits_TV)
            adapted_TV = adapted_logits(layer, base.head.transform, hidden_TD, entropy_T, logits_TV)
            above_T = adapted_TV.amax(-1) - adapted_TV.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            self.tokens += len(tokens)
        if published.resolve() != before:  # what a kill left without a reply was applied meanwhile
            return []
        worst = float(above_T.max())
        return [f"{name}: a greedy token is {worst:.3f} below the likeliest"] if worst > CLOSE else []


def asking(name: str, question: str, temperature: float) -> dict[str, Any]:
    """A request for an answer under an adapter."""
    turn = [{"role": "user", "content": question}]
    return {"model": f"base:{name}", "messages": turn, "max_tokens": TOKENS, "temperature": temperature}


def slope(memory: list[dict[str, Any]], who: str) -> dict[str, float]:
    """MiB a minute and its 95% interval (Theil and Sen), of the last two thirds of a time without a kill."""
    late = [one for one in memory[len(memory) // 3 :] if one[who]]
    minutes, sizes = [one["at"] / 60 for one in late], [one[who] / 2**20 for one in late]
    value, _, low, high = theilslopes(sizes, minutes, 0.95)
    return {"slope": float(value), "low": float(low), "high": float(high), "first": sizes[0], "last": sizes[-1]}


def main() -> None:
    """Serves, does all that, checks, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--tenants", type=int, default=24)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--server-kills", type=float, nargs="*", default=[0.12, 0.24], help="when, of the whole time")
    parser.add_argument("--learner-kills", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3, 0.34])
    parser.add_argument("--port", type=int, default=8441)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tenants = [Tenant(f"tenant-{number}") for number in range(args.tenants)]
    judge = Judge(load(args.model, device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        house = House(args.model, [tenant.name for tenant in tenants], Path(folder), args.port)
        clients = [Client(house, tenants[n :: args.clients], judge, n) for n in range(args.clients)]
        before = (house.root / "adapters" / UNTAUGHT).resolve()
        disturbed(house, clients, args)
        faults = [fault for client in clients for fault in client.faults]
        for tenant in tenants:
            faults += tenant.faults(house.server.get(f"/v1/adapters/{tenant.name}/history")["events"])
            faults += judge.faults(house, tenant.name, "Which city do you like best?")
        if (house.root / "adapters" / UNTAUGHT).resolve() != before:
            faults.append("an adapter that nobody taught has changed")
        house.stop()
        for tenant in tenants:
            path = house.root / "journals" / tenant.name / JOURNAL
            if path.exists():
                faults += tenant.faults_in_journal(path, lambda ids: spelled(judge, ids))
    longest = max(house.memory, key=len)
    record = {
        "kind": "learning lasting",
        **provenance(),
        "choices": {name: value for name, value in vars(args).items() if name != "output"},
        "actions": dict(sum((client.counts for client in clients), Counter[str]())),
        "acknowledged": sum(len(tenant.told) for tenant in tenants),
        "without_reply": sum(len(tenant.unknown) for tenant in tenants),
        "published": sum(sent["reply"]["published"] for tenant in tenants for sent in tenant.told.values()),
        "greedy_tokens": judge.tokens,
        "faults": faults,
        "memory": house.memory,
        "slopes": {who: slope(longest, who) for who in ("server", "learner")},
    }
    print({name: value for name, value in record.items() if name not in ("memory", "versions", "machine")})
    write_json(args.output, record)


def spelled(judge: Judge, ids: list[int]) -> str:
    """The text of tokens, without the end."""
    return str(judge._base.tokenizer.decode(ids, skip_special_tokens=True))


def disturbed(house: House, clients: list[Client], args: argparse.Namespace) -> None:
    """Lets the clients work for the time given, and kills what is to be killed meanwhile."""
    stopped, started = threading.Event(), time.time()
    threads = [threading.Thread(target=client.work, args=(stopped,)) for client in clients]
    kills = [(part, house.kill) for part in args.server_kills] + [
        (part, house.kill_learner) for part in args.learner_kills
    ]
    for thread in threads:
        thread.start()
    try:
        coming = sorted(kills, key=lambda kill: kill[0])
        while (part := (time.time() - started) / args.seconds) < 1:
            while coming and coming[0][0] <= part:
                coming.pop(0)[1]()
            house.look()
            time.sleep(min(5.0, args.seconds / 100))
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
