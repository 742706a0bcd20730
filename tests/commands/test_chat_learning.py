"""`moe-bias chat --learn`: a server that is killed at any point has learned what it acknowledged, once."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.chatting import asked
from helpers.complaints import complaint
from helpers.saved import save_adapter, save_model

SAID = [{"role": "user", "content": "w5 w6"}]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@contextmanager
def chatting(*more, first="Answers can be taught: the last 10,000 answers"):
    """The server's process and address, once it is there and has said these lines about learning."""
    port = free_port()
    words = ["chat", "--model", "tiny", "--adapters", "adapters", "--learn", "learned", "--port", port, *more]
    server = subprocess.Popen([sys.executable, "-m", "moe_bias", *words], stderr=subprocess.PIPE, text=True)
    try:
        for line in first.splitlines():
            assert line in server.stderr.readline()
        assert "/chat" in server.stderr.readline()
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_what_was_acknowledged_is_learned_once_whatever_is_killed(folder):
    save_model(folder / "tiny")
    save_adapter(folder / "adapters" / "one", "tiny")
    body = {"model": "tiny:one", "messages": SAID, "max_tokens": 3, "temperature": 0}
    with chatting() as (server, address):
        identity = asked(f"{address}/v1/chat/completions", body)[1]["id"]
        for edit in ("w7 w8", "w9", "w3 w4"):
            assert asked(f"{address}/v1/feedback", {"id": identity, "edit": edit, "wait": False})[0] == 202
        server.send_signal(signal.SIGKILL)
        server.wait()
    with chatting() as (server, address):
        deadline = time.monotonic() + 90
        while len(events(address)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [event["number"] for event in events(address)] == [1, 2, 3]
        assert [event["applied"] for event in events(address)] == [True, True, False]
        served = Path("learned/adapters/one").resolve()
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert served != (folder / "adapters" / "one")
    assert Path("learned/adapters/one").resolve() == served


def test_another_config_is_said_and_the_spool_is_as_it_was_asked_for(folder):
    save_model(folder / "tiny")
    save_adapter(folder / "adapters" / "one", "tiny")
    body = {"model": "tiny:one", "messages": SAID, "max_tokens": 3, "temperature": 0}
    with chatting("--learn-step-kl", "0.3") as (server, address):
        identity = asked(f"{address}/v1/chat/completions", body)[1]["id"]
        assert asked(f"{address}/v1/feedback", {"id": identity, "edit": "w7 w8"})[0] == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    said = (
        "What 'one' is told from now on is learned with passes 2 in place of 4, step_kl 0.5 in place of 0.3.\n"
        "Answers can be taught: the last 1 answers of the last 5 minutes, in 1.0 GiB"
    )
    more = ("--learn-passes", "2", "--learn-answers", "1", "--learn-answers-minutes", "5")
    with chatting(*more, "--learn-answers-memory", "1GiB", first=said) as (_, address):
        first, second = (asked(f"{address}/v1/chat/completions", body)[1]["id"] for _ in range(2))
        assert asked(f"{address}/v1/feedback", {"id": first, "reward": 1})[0] == 404
        assert asked(f"{address}/v1/feedback", {"id": second, "edit": "w9"})[0] == 200


def events(address):
    return asked(f"{address}/v1/adapters/one/history")[1]["events"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--learn", "l", "--host", "0.0.0.0"], "--host 0.0.0.0 lets whoever reaches this machine teach"),
        (["--key-file", "keys.json"], "nothing learns without --learn"),
        (["--learn", "l", "--key-file", "short.json"], "key 1 of 'short.json' has 3 characters"),
        (["--learn-passes", "2"], "--learn-passes 2 needs --learn"),
        (["--learn", "file"], "--learn 'file' cannot be a folder"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(folder, capsys, words, sentence):
    Path("keys.json").write_text(json.dumps({"a-secret-of-sixteen": "one"}))
    Path("short.json").write_text(json.dumps({"abc": "one"}))
    Path("file").touch()
    assert sentence in complaint(capsys, "chat", "--model", "nowhere", "--port", free_port(), *words)
