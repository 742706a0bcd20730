"""Adapters as model names, in front of a hand-made application in the place of vLLM's server."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from moe_bias.mistakes import UserError
from moe_bias.serving.names import AdapterNames

SERVED = ["tiny", "tiny:chat", "org/tiny"]
KEY = (b"authorization", b"Bearer key")
CARDS = [{"id": name, "root": "/models/tiny", "parent": None, "max_model_len": 64} for name in SERVED]
LORA = {"id": "a-lora", "root": "/loras/a", "parent": "tiny", "max_model_len": None}


class Server:
    """Lists its models to those who have the key, and answers every prompt in three pieces."""

    def __init__(self):
        self.asked = []

    async def __call__(self, scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        self.asked.append((scope["path"], message["body"], dict(scope["headers"])))
        if KEY not in scope["headers"]:
            await self._give(send, 401, [b"no"])
        elif scope["method"] == "POST":
            assert not message["more_body"]
            await self._give(send, 200, [b"one", b"two", b"three"])
            self.after = await receive()
        elif scope["path"].removeprefix(scope["root_path"]) == "/v1/models":
            await self._give(send, 200, [json.dumps({"object": "list", "data": [*CARDS, LORA]}).encode()])
        else:
            await self._give(send, 404, [b"nothing here"])

    async def _give(self, send, status, pieces):
        headers = [(b"x-from", b"server"), (b"content-length", str(sum(map(len, pieces))).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("math", "law"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "half-copied").mkdir()
    monkeypatch.setenv("MOE_BIAS_ADAPTERS", str(tmp_path))
    return tmp_path


def exchange(server, method, path, pieces=(b"",), headers=(KEY,), root_path=""):
    """The messages that a client gets. `pieces` are those of the body that it sends before it goes away."""
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name=name) for name in SERVED])
    scope = {"type": "http", "method": method, "path": root_path + path, "root_path": root_path}
    scope |= {"headers": list(headers), "app": SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))}
    incoming = [{"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]} for piece in pieces]
    incoming.append({"type": "http.disconnect"})
    got = []

    async def receive():
        return incoming.pop(0)

    async def send(message):
        got.append(message)

    asyncio.run(AdapterNames(server)(scope, receive, send))
    return got


def post(server, content, path="/v1/completions", **kwargs):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return exchange(server, "POST", path, [body[:7], body[7:]], headers=[KEY, (b"content-length", b"1")], **kwargs)


def passed_on(server):
    ((_, body, headers),) = server.asked
    assert headers[b"content-length"] == str(len(body)).encode()
    return json.loads(body)


def listed(got):
    status, body = got[0]["status"], b"".join(message.get("body", b"") for message in got[1:])
    assert (b"content-length", str(len(body)).encode()) in got[0]["headers"]
    assert (b"x-from", b"server") in got[0]["headers"]
    assert status == 200
    return json.loads(body)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_name_becomes_a_model_and_an_adapter(folder, path):
    server = Server()
    got = post(server, {"model": "tiny:math", "prompt": "1 + 1", "stream": True}, path)
    assert passed_on(server) == {
        "model": "tiny",
        "prompt": "1 + 1",
        "stream": True,
        "vllm_xargs": {"moe_bias": "math"},
    }
    assert [message.get("body") for message in got[1:]] == [b"one", b"two", b"three", b""]
    assert server.after == {"type": "http.disconnect"}


def test_other_arguments_stay(folder):
    server = Server()
    post(server, {"model": "tiny:math", "vllm_xargs": {"moe_bias": "math", "moe_bias_strength": 0.5}})
    assert passed_on(server)["vllm_xargs"] == {"moe_bias": "math", "moe_bias_strength": 0.5}


@pytest.mark.parametrize(
    ("name", "base", "adapter"),
    [
        ("org/tiny:math", "org/tiny", "math"),
        ("tiny:chat:math", "tiny:chat", "math"),  # not the adapter 'chat:math' of tiny
        ("tiny:unknown", "tiny", "unknown"),  # refused where every request is checked
        ("tiny:a:b", "tiny", "a:b"),
        ("tiny:math+law", "tiny", "math+law"),
    ],
)
def test_where_a_name_is_split(folder, name, base, adapter):
    server = Server()
    post(server, {"model": name})
    assert passed_on(server) == {"model": base, "vllm_xargs": {"moe_bias": adapter}}


@pytest.mark.parametrize("mapping", [{"math": 0.5, "law": 1}, {}])
def test_a_mapping_goes_on_as_text_which_vllm_takes(folder, mapping):
    server = Server()
    post(server, {"model": "tiny", "n": 1, "vllm_xargs": {"moe_bias": mapping, "other": [1]}})
    expected = {"moe_bias": json.dumps(mapping), "other": [1]}
    assert passed_on(server) == {"model": "tiny", "n": 1, "vllm_xargs": expected}


@pytest.mark.parametrize(
    "content",
    [
        {"model": "tiny", "vllm_xargs": {"moe_bias": "law"}},
        {"model": "tiny:chat"},
        {"model": "tiny:"},
        {"model": "tiny", "use_beam_search": True},
        {"model": "other:math"},
        {"model": "a-lora"},
        {"model": ["tiny:math"]},
        {"prompt": "no model"},
        {"model": "tiny:math", "vllm_xargs": "no mapping"},
        ["tiny:math"],
        b'{"model": "tiny:math"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"",
    ],
)
def test_what_names_no_adapter_passes_byte_for_byte(folder, content):
    server = Server()
    post(server, content)
    assert server.asked[0][1] == (content if isinstance(content, bytes) else json.dumps(content).encode())


def test_a_path_that_would_drop_the_adapter_gets_the_name_as_it_is(folder):
    server = Server()
    body = b'{"model": "tiny:math"}'
    exchange(server, "POST", "/v1/embeddings", [body])
    assert server.asked[0][:2] == ("/v1/embeddings", body)


@pytest.mark.parametrize("other", ["law", {"law": 1.0}])
def test_two_different_adapters_are_refused(folder, other):
    server = Server()
    start, body = post(server, {"model": "tiny:math", "vllm_xargs": {"moe_bias": other}})
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["code"], server.asked) == (400, 400, [])
    assert "'math'" in error["message"]
    assert "'law'" in error["message"]


@pytest.mark.parametrize("asked", [{"model": "tiny:math"}, {"model": "tiny", "vllm_xargs": {"moe_bias": "math"}}])
def test_beam_search_is_refused_which_would_drop_the_adapter(folder, asked):
    server = Server()
    start, body = post(server, {**asked, "use_beam_search": True})
    assert (start["status"], server.asked) == (400, [])
    assert "leave use_beam_search out" in json.loads(body["body"])["error"]["message"]


@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy"])
def test_the_list_has_each_adapter_under_each_served_name(folder, root_path):
    cards = listed(exchange(Server(), "GET", "/v1/models", root_path=root_path))["data"]
    assert cards[:4] == [*CARDS, LORA]
    ours = {card["id"]: card for card in cards[4:]}
    assert set(ours) == {f"{base}:{adapter}" for base in SERVED for adapter in ("math", "law")}
    assert ours["org/tiny:law"] == {
        "id": "org/tiny:law",
        "root": str(folder / "law"),
        "parent": "org/tiny",
        "max_model_len": 64,
    }


def test_the_list_is_that_of_now(folder):
    server = Server()
    before = {card["id"] for card in listed(exchange(server, "GET", "/v1/models"))["data"]}
    (folder / "half-copied" / "adapter_config.json").write_text("{}")
    (folder / "law" / "adapter_config.json").unlink()
    after = {card["id"] for card in listed(exchange(server, "GET", "/v1/models"))["data"]}
    assert after - before == {f"{base}:half-copied" for base in SERVED}
    assert before - after == {f"{base}:law" for base in SERVED}


@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy"])
@pytest.mark.parametrize("name", ["tiny:math", "org/tiny:math", "tiny:chat"])
def test_one_model(folder, name, root_path):
    assert listed(exchange(Server(), "GET", f"/v1/models/{name}", root_path=root_path))["id"] == name


def test_one_model_that_there_is_not(folder):
    server = Server()
    got = exchange(server, "GET", "/v1/models/tiny:absent")
    assert (got[0]["status"], got[1]["body"]) == (404, b"nothing here")
    assert server.asked[-1][0] == "/v1/models/tiny:absent"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny:math"])
def test_the_list_needs_the_key(folder, path):
    got = exchange(Server(), "GET", path, headers=[])
    assert (got[0]["status"], got[1]["body"]) == (401, b"no")


def test_other_connections_pass(folder):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    asyncio.run(AdapterNames(app)({"type": "lifespan"}, None, None))
    assert seen == [{"type": "lifespan"}]


def test_without_a_folder_it_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("MOE_BIAS_ADAPTERS", raising=False)
    with pytest.raises(UserError, match="MOE_BIAS_ADAPTERS is not set"):
        AdapterNames(Server())
