"""`moe-bias eval --endpoint` against a real HTTP server in this process, which also fails as servers do."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.complaints import complaint
from helpers.evaluations import lines, write
from moe_bias.cli import main

pytestmark = pytest.mark.usefixtures("folder")
PROBLEMS = 4


class Server(ThreadingHTTPServer):
    """Adds two numbers, wrongly for every odd seed; `falters` may take the place of the answer to a request."""

    def __init__(self, falters=lambda number, handler: False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.falters = falters
        self.asked = []
        self.keys = set()
        self.count = 0
        self.released = threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self):
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.count += 1
            number = self.server.count
        if self.server.falters(number, self):
            return
        self.server.asked.append(request)
        self.server.keys.add(self.headers["Authorization"])
        is_chat = self.path == "/v1/chat/completions"
        question = request["messages"][0]["content"] if is_chat else request["prompt"]
        left, right = (int(word) for word in question.split("?")[0].split("+"))
        text = f"It is \\boxed{{{left + right + request['seed'] % 2}}}."
        choice = {"index": 0, "finish_reason": "length" if left == 0 else "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        self.send({"id": "1", "object": "answer", "choices": [choice], "usage": {"completion_tokens": 7}})

    def send(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(folder, monkeypatch, grader):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    write(folder / "sums.jsonl", [{"problem": f"{n} + 1?", "answer": n + 1} for n in range(PROBLEMS)])
    servers = []

    def started(*arguments):
        servers.append(Server(*arguments))
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


def words_to(server, output, *more, models="m"):
    words = ["eval", "--endpoint", server.url, "--endpoint-model", models, "--data", "sums.jsonl", "--output", output]
    return [*words, "--samples", "4", "--temperature", "1", "--batch-size", "2", *more]


def test_a_server_is_asked_by_the_protocol_and_graded(serve, capsys):
    server = serve()
    assert main(words_to(server, "out", "--top-p", "0.9", "--max-new-tokens", "50", models="m,n")) == 0
    assert len(server.asked) == 2 * PROBLEMS * 4
    one = server.asked[0]
    assert one["messages"][0]["content"].startswith("0 + 1?\n\nReason step by step")
    assert (one["temperature"], one["top_p"], one["max_tokens"]) == (1, 0.9, 50)
    assert {request["model"] for request in server.asked} == {"m", "n"}
    assert len({request["seed"] for request in server.asked}) == PROBLEMS * 4  # the same for both models
    assert server.keys == {"Bearer a-key"}
    kept = lines(Path("out"))
    assert {line["problem"] for line in kept if not line["finished"]} == {"1"}
    assert {line["tokens"] for line in kept} == {7}
    record = json.loads(Path("out/record.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == ["m", "n"]
    assert record["arms"][0]["accuracy"]["value"] == 0.5  # two of four seeds in a row are odd
    assert record["arms"][0]["pass_at"]["4"]["value"] == 1
    assert record["arms"][0]["cut"] == 0.25
    assert record["arms"][1]["change"]["m"]["value"] == 0
    assert "a-key" not in "".join(path.read_text() for path in Path("out").iterdir())
    assert "m" in capsys.readouterr().out


def test_a_model_of_a_server_is_told_more(serve):
    server = serve()
    assert main(words_to(server, "out", "--instruction", "Be brief.", models="m,n")) == 0
    prompts = [(request["model"], request["messages"][0]["content"]) for request in server.asked]
    told = {(model, prompt.endswith("\n\nBe brief.")) for model, prompt in prompts}
    assert told == {("m", False), ("n", False), ("m", True)}
    arms = json.loads(Path("out/record.json").read_text())["arms"]
    assert [(arm["name"], arm["instruction"]) for arm in arms] == [("m", ""), ("n", ""), ("instructed", "Be brief.")]
    assert arms[2]["token_share"]["value"] == 1  # all answers have 7 tokens
    assert main(words_to(server, "other", "--instruction", "Be brief.", models="instructed")) == 2


def test_plain_text_is_continued(serve):
    server = serve()
    assert main(words_to(server, "out", "--no-chat", "--prompt-template", "{question} It is")) == 0
    assert {request["prompt"] for request in server.asked} == {f"{n} + 1? It is" for n in range(PROBLEMS)}


def busy(number, handler):
    if number in (2, 5):
        handler.send({"error": {"message": "busy"}}, 503)
    return number in (2, 5)


def test_a_busy_server_is_asked_again(serve):
    assert main(words_to(serve(busy), "out", "--endpoint-retries", "2")) == 0
    assert len(lines(Path("out"))) == PROBLEMS * 4


def hangs(number, handler):
    if number > 10:
        handler.server.released.wait(20)
        handler.close_connection = True
    return number > 10


def test_a_server_that_stops_answering_in_the_middle(serve, capsys):
    server = serve(hangs)
    limits = ["--endpoint-timeout", "1.5", "--endpoint-retries", "1"]
    sentence = complaint(capsys, *words_to(server, "out", *limits))
    assert sentence.startswith(f"{server.url} gives no answers of 'm' (Request timed out.")
    assert sentence.endswith(
        "answers to 2 of 4 problems are kept in out/samples.jsonl; the same command answers the others"
    )
    before = lines(Path("out"))
    assert len(before) == 2 * 4
    assert not Path("out/record.json").exists()
    server.falters = lambda number, handler: False
    server.released.set()
    server.asked.clear()
    assert main(words_to(server, "out", *limits)) == 0
    assert len(server.asked) == 2 * 4  # what is kept is not asked again
    assert lines(Path("out"))[:8] == before
    assert len(lines(Path("out"))) == PROBLEMS * 4


def refuses(number, handler):
    handler.send({"error": {"message": "no such model"}}, 404)
    return True


def odd(number, handler):
    handler.send({"hello": "world"})
    return True


@pytest.mark.parametrize(
    ("falters", "reason"),
    [(refuses, "Error code: 404.*no such model"), (odd, "its answer is not of OpenAI's protocol")],
)
def test_other_failures_are_told(serve, falters, reason, capsys):
    sentence = complaint(capsys, *words_to(serve(falters), "out"))
    assert re.search(reason, sentence)
    assert "answers to 0 of 4 problems are kept" in sentence


def test_the_client_may_be_absent(serve, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    sentence = complaint(capsys, *words_to(serve(), "out"))
    assert sentence.endswith("needs openai, which is not installed: pip install 'moe-bias[endpoint]'")
