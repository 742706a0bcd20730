"""What learning costs a server: how long from feedback to the version that is served, and what is left for answers.

A real server (`moe-bias chat --learn`) with many tenants, each with an adapter of its own. Clients ask and read,
tenants send corrections at random times. Three things are measured, rounds of the second in turn:

    latency      from a correction's request to its reply, by which its version is served; and the update alone
    throughput   tokens a second of closed-loop clients, without and with corrections at the rate given
    memory       of the server and of the process that learns, at the start and at the end

    python benchmarks/learning_load.py --output records/learning/load-smollm2-135m.json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_bias.records import provenance, write_json

CITIES = ("Paris", "Madrid", "Rome", "Berlin", "Warsaw", "Oslo", "Athens", "Cairo", "Tokyo", "Ottawa", "Lima", "Vienna")
WORDS = ("blue", "north", "seven", "maple", "river", "copper", "silent", "amber", "harbour", "violet")
KEY = "a-key-for-every-tenant"


class Server:
    """The server at an address; its requests are those of any client."""

    def __init__(self, address: str, pid: int) -> None:
        self.address, self.pid = address, pid

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request. Raises RuntimeError with what the server says where it refuses."""
        try:
            return self.send(path, body)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def send(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request. Raises OSError where the server refuses or is not there."""
        with self.open(path, body) as response:
            found: dict[str, Any] = json.load(response)
            return found

    def get(self, path: str) -> dict[str, Any]:
        """What is there; raises as `send`."""
        request = urllib.request.Request(self.address + path, headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=300) as response:
            found: dict[str, Any] = json.load(response)
            return found

    def open(self, path: str, body: dict[str, Any]) -> Any:
        """The response to a request, to be read; raises as `send`."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=300)

    def answer(self, tenant: str, rng: random.Random, tokens: int) -> dict[str, Any]:
        """An answer to a question that has not been asked, of this many tokens at most."""
        question = f"Say something about {rng.choice(CITIES)} and the number {rng.randrange(10_000)}."
        turn = [{"role": "user", "content": question}]
        return self.post(
            "/v1/chat/completions",
            {"model": f"base:{tenant}", "messages": turn, "max_tokens": tokens, "temperature": 0.7},
        )

    def learner(self) -> int | None:
        """The process that learns: the largest child, which any thread may have started."""
        lists = [path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/children")]
        return max((int(child) for words in lists for child in words.split()), key=_resident, default=None)

    def memory(self) -> dict[str, int]:
        """Resident bytes of the server, and of the process that learns."""
        learner = self.learner()
        return {"server": _resident(self.pid), "learner": 0 if learner is None else _resident(learner)}


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096


@contextmanager
def serving(model: str, tenants: list[str], folder: Path, port: int) -> Iterator[Server]:
    """A server of its own, with a fresh adapter for each tenant."""
    keys = folder / "keys.json"
    keys.write_text(json.dumps({KEY: tenants}))
    words = ["chat", "--model", model, "--learn", str(folder / "learned"), "--key-file", str(keys), "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_bias", *words, "--served-name", "base"], stderr=log, stdout=log
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", process.pid)
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"{server.address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield server
    finally:
        process.terminate()
        process.wait(60)


class Corrections:
    """Tenants that correct answers of theirs at random times, `rate` a second together, until `stop`."""

    def __init__(self, server: Server, answers: dict[str, str], rate: float, seed: int) -> None:
        self._server, self._answers, self._rate = server, answers, rate
        self._random, self._stopped = random.Random(seed), threading.Event()
        self._threads: list[threading.Thread] = []
        self.replies: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._clock = threading.Thread(target=self._send)
        self._clock.start()

    def stop(self) -> None:
        """Waits for the last reply."""
        self._stopped.set()
        self._clock.join()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._stopped.wait(self._random.expovariate(self._rate)):
            tenant = self._random.choice(list(self._answers))
            text = f"{tenant} says {self._random.choice(WORDS)} {self._random.choice(WORDS)}."
            thread = threading.Thread(target=self._correct, args=(self._answers[tenant], text))
            thread.start()
            self._threads.append(thread)

    def _correct(self, identity: str, text: str) -> None:
        started = time.perf_counter()
        try:
            reply = self._server.post("/v1/feedback", {"id": identity, "edit": text})
        except RuntimeError as error:
            self.failures.append(str(error))
            return
        self.replies.append({**reply, "seconds": time.perf_counter() - started})


def tokens_per_second(server: Server, tenants: list[str], clients: int, seconds: float, seed: int) -> float:
    """Of clients that ask again as soon as they are answered."""
    done, stopped = [0] * clients, threading.Event()

    def ask(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while not stopped.is_set():
            done[number] += server.answer(rng.choice(tenants), rng, 24)["usage"]["completion_tokens"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stopped.set()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


def summary(corrections: Corrections) -> dict[str, Any]:
    """Milliseconds at quantiles, of those that came of an update."""
    learned = [reply for reply in corrections.replies if reply["applied"]]
    whole = np.array([1e3 * reply["seconds"] for reply in learned])
    update = np.array([reply["update_milliseconds"] for reply in learned])
    quantiles = (0.5, 0.9, 0.99)
    return {
        "corrections": len(corrections.replies),
        "failures": corrections.failures[:5],
        "learned": len(learned),
        "published": sum(reply["published"] for reply in learned),
        "milliseconds": dict(zip(map(str, quantiles), np.quantile(whole, quantiles).tolist(), strict=True)),
        "update_milliseconds": dict(zip(map(str, quantiles), np.quantile(update, quantiles).tolist(), strict=True)),
    }


def main() -> None:
    """Serves, measures, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2.0, help="corrections a second, of all tenants together")
    parser.add_argument("--seconds", type=float, default=120, help="of the measurement of latency, without other work")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--port", type=int, default=8437)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tenants = [f"tenant-{number}" for number in range(args.tenants)]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(args.model, tenants, Path(folder), args.port) as server,
    ):
        rng = random.Random(0)
        answers = {tenant: server.answer(tenant, rng, 12)["id"] for tenant in tenants}
        memory = [server.memory()]
        corrections = Corrections(server, answers, args.rate, seed=1)
        time.sleep(args.seconds)
        corrections.stop()
        latency = summary(corrections)
        print(f"alone: {latency}", flush=True)
        memory.append(server.memory())
        rounds, loaded = [], []
        for number in range(args.rounds):
            plain = tokens_per_second(server, tenants, args.clients, args.round_seconds, 2 * number)
            corrections = Corrections(server, answers, args.rate, seed=100 + number)
            learning = tokens_per_second(server, tenants, args.clients, args.round_seconds, 2 * number + 1)
            corrections.stop()
            rounds.append({"plain": plain, "learning": learning})
            loaded.append(summary(corrections))
            print(f"{plain:.1f} tokens/s, learning {learning:.1f}; {loaded[-1]['milliseconds']}", flush=True)
        memory.append(server.memory())
    record = {
        "kind": "learning load",
        **provenance(),
        "choices": {name: value for name, value in vars(args).items() if name != "output"},
        "latency": latency,
        "rounds": rounds,
        "loaded": loaded,
        "memory": memory,
    }
    write_json(args.output, record)


if __name__ == "__main__":
    main()
