"""The server over HTTP: OpenAI's own client, what is refused and how, and what a browser cannot be made to do."""

import json
import socket
import time
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest
from starlette.responses import JSONResponse
from starlette.routing import Route

import moe_bias as mb
from helpers.chatting import asked, listening, served_folder
from helpers.saved import save_adapter, save_model
from moe_bias.server.app import make_app
from moe_bias.server.engine import Engine

SAID = [{"role": "user", "content": "w5 w6 w7"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def address(served):
    with listening(make_app(Engine(*served), name="base", limit=20)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def answered(client, model="base", **choices):
    return client.chat.completions.create(model=model, messages=SAID, **{"max_tokens": 8, "seed": 3, **choices})


def refusal(address, **body):
    status, found = asked(address + CHAT, {"model": "base", "messages": SAID, **body})
    assert set(found) == {"error"}
    return status, found["error"]


def test_answers_are_the_librarys(served, client):
    base, adapters = served
    twin = mb.load(base.model.name_or_path, device="cpu")
    for model, layer in (("base", None), ("base:one", mb.load_layer(adapters / "one", twin))):
        expected = mb.generate(twin, SAID[0]["content"], layer, temperature=0.8, max_new_tokens=8, seed=3)
        found = answered(client, model, temperature=0.8)
        assert found.choices[0].message.content == expected
        assert found.model == model
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        chunks = list(answered(client, model, temperature=0.8, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == found.choices[
            0
        ].finish_reason
        assert chunks[-1].usage.completion_tokens == found.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_adapters_are_asked_for_by_name_field_or_mapping(client):
    plain = answered(client).choices[0].message.content
    named = answered(client, "base:one").choices[0].message.content
    assert plain != named
    for extra in ({"moe_bias": "one"}, {"moe_bias": {"one": 1.0}}, {"vllm_xargs": {"moe_bias": '{"one": 1.0}'}}):
        assert answered(client, extra_body=extra).choices[0].message.content == named
    for extra in ({"moe_bias": "one", "moe_bias_strength": 0}, {"moe_bias": {"one": 0, "two": 0}}):
        assert answered(client, extra_body=extra).choices[0].message.content == plain
    both = answered(client, "base:one+two").choices[0].message.content
    assert both == answered(client, extra_body={"moe_bias": {"one": 1, "two": 1}}).choices[0].message.content


def test_models_are_the_base_and_each_adapter(address, client):
    assert [model.id for model in client.models.list()] == ["base", "base:one", "base:two"]
    assert client.models.retrieve("base:two").parent == "base"
    assert asked(f"{address}/v1/models/other")[0] == 404
    assert asked(f"{address}/v1/adapters") == (200, {"learning": False, "adapters": [{"name": "one"}, {"name": "two"}]})
    assert asked(f"{address}/health") == (200, {"status": "ok"})


def test_messages_may_be_in_parts_and_stops_end_the_text(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5 w6 "}, {"type": "text", "text": "w7"}]}]
    whole = answered(client, temperature=0)
    again = client.chat.completions.create(model="base", messages=parts, max_tokens=8, temperature=0)
    assert again.choices[0].message.content == whole.choices[0].message.content
    second = whole.choices[0].message.content.split()[1]
    cut = answered(client, temperature=0, stop=second)
    assert cut.choices[0].message.content == whole.choices[0].message.content.partition(second)[0]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == "".join(
        chunk.choices[0].delta.content or "" for chunk in answered(client, temperature=0, stop=[second], stream=True)
    )


def test_numbers_of_the_tokens_come_with_them(address):
    body = {"model": "base:one", "messages": SAID, "max_tokens": 5, "seed": 3, "moe_bias_numbers": True}
    _, whole = asked(address + CHAT, body)
    assert "".join(token["text"] for token in whole["moe_bias"]).strip() == whole["choices"][0]["message"]["content"]
    assert {"id", "entropy", "kl", "move", "base", "adapted", "adapters", "flip"} <= set(whole["moe_bias"][0])
    request = urllib.request.Request(address + CHAT, json.dumps({**body, "stream": True}).encode())
    with urllib.request.urlopen(request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        sent = [line[6:] for line in response.read().decode().split("\n\n") if line]
    assert sent.pop() == "[DONE]"
    told = [chunk["moe_bias"] for chunk in map(json.loads, sent) if "moe_bias" in chunk]
    assert told == [{key: value for key, value in token.items() if key != "text"} for token in whole["moe_bias"]]


def test_what_is_unknown_and_harmless_is_ignored(address):
    for extra in (
        {"user": "me"},
        {"n": 1},
        {"logprobs": False},
        {"temperature": None},
        {"response_format": {"type": "text"}},
    ):
        assert asked(address + CHAT, {"model": "base", "messages": SAID, "max_tokens": 1, **extra})[0] == 200


@pytest.mark.parametrize(
    ("extra", "field", "says"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0, not -1"),
        ({"temperature": "hot"}, "temperature", "valid number, not 'hot'"),
        ({"temperature": True}, "temperature", "not True"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "not 0"),
        ({"max_tokens": 2.5}, "max_tokens", "not 2.5"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": [1]}, "stop", "valid string"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages", "it is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "parts of a message are text",
        ),
        ({"model": None}, "model", "valid string"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"n": 2}, "n", "n is 2, which this server cannot do"),
        ({"tools": [{}]}, "tools", "cannot do"),
        ({"logprobs": True}, "logprobs", "cannot do"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "cannot do"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot do"),
        ({"moe_bias": 3}, "moe_bias", "must be the name of an adapter"),
        ({"moe_bias": {}}, "moe_bias", "empty mapping"),
        ({"moe_bias": {"one": "1"}}, "moe_bias", "finite number"),
        ({"moe_bias": {"one": 1000}}, "moe_bias", "from -100 to 100, not 1000"),
        ({"moe_bias": "one", "moe_bias_strength": "big"}, "moe_bias", "finite number"),
        ({"moe_bias_strength": 1}, "moe_bias_strength", "without an adapter"),
        ({"model": "base:one", "moe_bias": "two"}, "moe_bias", "give one"),
        ({"messages": [{"role": "user", "content": "w5 " * 200}]}, "messages", "the model reads 128 with the answer"),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(address, extra, field, says):
    status, error = refusal(address, **extra)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert says in error["message"]
    assert "\n" not in error["message"]


def test_what_is_not_there_is_not_found(address):
    for body in ({"model": "other"}, {"model": "base:three"}, {"moe_bias": "three"}):
        status, error = refusal(address, **body)
        assert (status, error["code"]) == (404, "model_not_found")
    status, found = asked(f"{address}/v1/embeddings", {})
    assert (status, found["error"]["type"]) == (404, "invalid_request_error")
    assert asked(f"{address}{CHAT}")[0] == 405
    for body in (b"", b"{", b"[" * 10_000, b"3", b'"a"'):
        status, found = asked(address + CHAT, body)
        assert status == 400
        assert "JSON" in found["error"]["message"]


def test_an_adapter_that_cannot_be_served_is_told_and_the_others_are(served, tmp_path):
    base, _ = served
    save_adapter(tmp_path / "good", base.model.name_or_path)
    save_adapter(tmp_path / "bad", base.model.name_or_path)
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with listening(make_app(Engine(base, tmp_path), name="base")) as address:
        status, error = refusal(address, moe_bias="bad")
        assert (status, error["param"]) == (400, "model")
        assert "'bad' cannot be served" in error["message"]
        assert asked(address + CHAT, {"model": "base:good", "messages": SAID, "max_tokens": 1})[0] == 200


def test_a_model_without_a_chat_template_says_so(tmp_path):
    base = mb.load(save_model(tmp_path, chat_template=None), device="cpu")
    with listening(make_app(Engine(base), name="base")) as address:
        assert "has no chat template" in refusal(address)[1]["message"]


def test_a_strength_that_changes_reaches_the_answer_that_is_written(address):
    body = {"model": "base:one", "messages": SAID, "max_tokens": 100, "stream": True, "moe_bias_numbers": True}
    request = urllib.request.Request(address + CHAT, json.dumps({**body, "temperature": 0, "seed": 1}).encode())
    strengths = []
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if not strengths:
                change = {"id": chunk["id"], "strength": 0.25, "adapter": "one"}
                status, found = asked(f"{address}/chat/strength", change)
                assert (status, found) == (200, {"id": chunk["id"], "strength": 0.25})
                assert asked(f"{address}/chat/strength", {**change, "adapter": "two"})[0] == 400
                assert asked(f"{address}/chat/strength", {**change, "strength": "x"})[0] == 400
            if "moe_bias" in chunk:
                strengths.append(chunk["moe_bias"]["adapters"][0]["strength"])
    assert strengths[-1] == 0.25
    assert asked(f"{address}/chat/strength", change)[0] == 404


def counters(address):
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def test_requests_and_tokens_are_counted_by_adapter(address, client):
    before = counters(address)
    answered(client, "base:one", temperature=0)
    found = answered(client, "base:one+two", temperature=0)
    after = counters(address)

    def more(name, adapter):
        key = f'moe_bias:{name}_total{{adapter="{adapter}"}}'
        return after[key] - before.get(key, 0)

    assert (more("requests", "one"), more("requests", "two")) == (2, 1)
    assert more("tokens", "two") == found.usage.completion_tokens


def test_a_client_that_goes_away_is_not_answered_on(served):
    """With one row at a time the next answer could otherwise begin only when the first has its thousand tokens."""
    base, adapters = served
    engine = Engine(base, adapters, rows=1)
    written = []
    choose = engine._take
    engine._take = lambda answering, choice: written.append(answering.id) or _never(choose(answering, choice))
    engine._stop_ids = frozenset()
    with listening(make_app(engine, name="base")) as address:
        for stream in (True, False):
            body = json.dumps({"model": "base", "messages": SAID, "stream": stream, "max_tokens": 100}).encode()
            host = urlsplit(address)
            with socket.create_connection((host.hostname, host.port)) as line:
                head = f"POST {CHAT} HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
                line.sendall(head.encode() + body)
                if stream:
                    line.recv(1)
                time.sleep(0.2)
            deadline = time.monotonic() + 30
            while engine.call(lambda: len(engine._rows)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert engine.call(lambda: len(engine._rows)) == 0
    assert len(set(written)) == 2


def _never(reason):
    """The answer of the test goes on for ever."""


def test_pages_of_other_sites_reach_nothing(address):
    body = {"model": "base", "messages": SAID, "max_tokens": 1}
    status, found = asked(address + CHAT, body, Origin="https://other.example")
    assert status == 403
    assert "origin" in found["error"]["message"]
    assert asked(address + CHAT, body, Origin=address)[0] == 200
    assert asked(address + CHAT, body, Host="rebound.example")[0] == 400
    host = urlsplit(address)
    assert asked(address + CHAT, body, Host=f"localhost:{host.port}", Origin=f"http://localhost:{host.port}")[0] == 200


def test_a_body_larger_than_any_context_is_refused_before_it_is_read(address):
    host = urlsplit(address)
    with socket.create_connection((host.hostname, host.port)) as line:
        line.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Length: {2**23 + 1}\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_routes_of_others_go_first_and_what_they_hold_is_closed(served):
    closed = []
    engine = Engine(*served)

    def close():
        closed.append(engine.is_running)

    async def adapters(request):
        return JSONResponse({"learning": True, "adapters": []})

    app = make_app(engine, [Route("/v1/adapters", adapters)], closing=close)
    with listening(app) as address:
        assert asked(f"{address}/v1/adapters") == (200, {"learning": True, "adapters": []})
        assert asked(f"{address}/v1/models")[1]["data"][0]["id"] == "model"
    assert closed == [True]
    assert not engine.is_running
