"""`moe-bias chat`: a process of its own, from its first sentence to its last."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chatting import asked
from helpers.complaints import complaint
from helpers.saved import save_adapter, save_model

SAID = [{"role": "user", "content": "w5 w6"}]


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@pytest.mark.parametrize("words", [["chat"], ["serve", "--engine", "transformers"]])
def test_it_says_where_it_is_answers_and_ends(folder, free_port, words):
    save_model(folder / "tiny")
    save_adapter(folder / "adapters" / "one", "tiny")
    program = [sys.executable, "-m", "moe_bias", *words, "--model", "tiny", "--adapters", "adapters"]
    address = f"http://127.0.0.1:{free_port}"
    body = {"model": "tiny:one", "messages": SAID, "max_tokens": 3}
    server = subprocess.Popen([*program, "--port", free_port], stderr=subprocess.PIPE, text=True)
    try:
        told = server.stderr.readline()
        assert told == f"tiny is at {address}/chat, for clients of OpenAI's protocol at {address}/v1\n"
        assert asked(f"{address}/v1/chat/completions", body)[0] == 200
        server.send_signal(signal.SIGINT)
        assert server.communicate(timeout=60)[1] == "Stopped.\n"
        assert server.returncode == 0
    finally:
        server.kill()


def test_what_cannot_be_had_is_told_before_a_server_is_there(folder, free_port, capsys):
    save_model(folder / "tiny", chat_template=None)
    words = ("chat", "--model", "tiny", "--port", free_port)
    assert "has no chat template, so there is no chat with it" in complaint(capsys, *words)
    assert complaint(capsys, *words, "--adapters", "none") == "--adapters 'none' is not a folder"
    Path("others").mkdir()
    Path("others/notes.txt").touch()
    assert "holds other things but no adapter" in complaint(capsys, *words, "--adapters", "others")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert complaint(capsys, "chat", "--port", port).startswith(
            f"a server cannot listen at --host 127.0.0.1 --port {port}"
        )
