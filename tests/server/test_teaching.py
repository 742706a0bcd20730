"""Feedback over HTTP, on a tiny model: what is learned is what the next request is answered with."""

import urllib.request

import pytest
import torch

import moe_bias as mb
from helpers.chatting import asked, listening, served_folder
from helpers.lessons import InlineWorker
from helpers.models import token_ids
from moe_bias.backbone import hidden_states
from moe_bias.config import LearnConfig, SpoolLimits
from moe_bias.learning import service
from moe_bias.learning.service import Learning
from moe_bias.server.app import make_app
from moe_bias.server.engine import Engine
from moe_bias.server.keys import Keys
from moe_bias.server.metrics import Counters
from moe_bias.server.teaching import Teaching

ALICE, BOB = "alice-secret-0123", "bob-secret-456789"
CONFIG = LearnConfig(expert_rate=0.05, held_out_every=100)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The two adapters, and one that has learned nothing."""
    base, adapters = served_folder(tmp_path_factory.mktemp("served"))
    torch.manual_seed(0)
    layer, ids = base.head.layer(mb.LayerConfig(support=tuple(range(2, 40)))), token_ids(20)
    layer.calibrate(hidden_states(base.model, ids, torch.ones_like(ids)))
    mb.save(layer, adapters / "fresh", base)
    return base, adapters


@pytest.fixture
def begun(served, tmp_path, monkeypatch):
    """A server that learns; call it with keys, or the answers that are kept, and it gives its address.

    The one before is stopped.
    """
    monkeypatch.setattr(service, "Worker", InlineWorker)
    open_servers = []

    def begin(keys=None, **limits):
        base, adapters = served
        learning = Learning(tmp_path / "learned", adapters, base.head, CONFIG, SpoolLimits(**limits))
        engine, counters = Engine(base, learning.adapters, learning.spool.keep), Counters()
        routes = Teaching.of_engine(engine, learning, keys or Keys(), counters.learning).routes
        server = listening(make_app(engine, routes, name="base", limit=10, counters=counters, closing=learning.close))
        stop()
        open_servers.append(server)
        return server.__enter__()

    def stop():
        while open_servers:
            open_servers.pop().__exit__(None, None, None)

    yield begin
    stop()


def answer(address, model="base:fresh", text="w5 w6 w7", **choices):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **choices}
    status, found = asked(f"{address}/v1/chat/completions", body)
    assert status == 200, found
    return found["id"], found["choices"][0]["message"]["content"]


def teach(address, key=None, **body):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return asked(f"{address}/v1/feedback", body, **headers)


def told(address, path, key=None, body=None):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return asked(f"{address}/v1/adapters/{path}", body, **headers)


def test_edits_become_what_is_answered(begun):
    address = begun()
    wanted = "w8 w5 w9"
    assert answer(address)[1] != wanted
    for count in range(1, 13):
        identity, text = answer(address)
        if text == wanted:
            break
        status, found = teach(address, id=identity, edit=wanted)
        assert status == 200
        assert found["adapter"] == "fresh"
        assert found["feedback"] == count
        assert found["milliseconds"] >= found["update_milliseconds"] > 0
    assert answer(address)[1] == wanted
    assert answer(address, "base:two")[1] != wanted
    status, found = told(address, "fresh/history")
    assert status == 200
    assert [event["number"] for event in found["events"]] == list(range(1, count))
    assert told(address, "two/history")[1]["events"] == []


def test_undo_and_freeze(begun):
    address = begun()
    before = answer(address)[1]
    for _ in range(3):
        teach(address, id=answer(address)[0], edit="w8 w5 w9")
    status, found = told(address, "fresh/freeze", body={})
    assert (status, found["event"]) == (200, "freeze")
    assert teach(address, id=answer(address)[0], edit="w9")[1]["reason"] == "the adapter is frozen"
    told(address, "fresh/unfreeze", body={})
    for version in (4, 5, 6):
        status, found = told(address, "fresh/undo", body={})
        assert (status, found["published"], found["version"]) == (200, True, version)
    assert answer(address)[1] == before
    assert "no version to go back to" in told(address, "fresh/undo", body={})[1]["reason"]


def test_rewards_and_preferences_are_taken(begun):
    address = begun()
    first, _ = answer(address, temperature=1.0, seed=1)
    second, _ = answer(address, temperature=1.0, seed=2)
    assert teach(address, id=first, reward=-1)[1]["applied"]
    found = teach(address, id=second, prefer=first)[1]
    assert found["applied"]
    assert found["kl_step"] >= 0
    other, _ = answer(address, text="w8 w9")
    status, found = teach(address, id=second, prefer=other)
    assert status == 400
    assert "another request" in found["error"]["message"]
    assert teach(address, id=first, reward=0.5, wait=False)[0] == 202


def test_a_tenant_touches_its_own_adapter_alone(begun):
    address = begun(Keys({ALICE: ("one",), BOB: ("two",)}))
    identity, _ = answer(address, "base:one")
    for key in (None, BOB, "wrong"):
        status, found = teach(address, key, id=identity, edit="w8")
        assert status == 404
        assert "this key may teach" in found["error"]["message"]
        for path in ("one/history", "one/undo"):
            assert told(address, path, key, None if path.endswith("history") else {})[0] == 404
    assert teach(address, ALICE, id=identity, edit="w8")[0] == 200
    assert told(address, "one/history", ALICE)[0] == 200
    foreign, _ = answer(address, "base:two")
    status, found = teach(address, ALICE, id=identity, prefer=foreign)
    assert (status, found["error"]["param"]) == (404, "prefer")
    listed = asked(f"{address}/v1/adapters", authorization=f"Bearer {BOB}")[1]
    assert listed == {
        "learning": True,
        "keyed": True,
        "adapters": [{"name": name, "learns": name == "two"} for name in ("fresh", "one", "two")],
    }


def test_mistakes_are_sentences_and_teach_nothing(begun):
    address = begun()
    identity, _ = answer(address)
    plain, _ = answer(address, "base")
    for body, status, sentence in (
        ({"id": "nothing", "reward": 1}, 404, "no answer 'nothing'"),
        ({"id": plain, "reward": 1}, 404, "under one adapter are kept"),
        ({"id": 7, "reward": 1}, 404, "no answer 7"),
        ({"id": identity}, 400, "none of them"),
        ({"id": identity, "reward": 1, "edit": "w3"}, 400, "edit and reward"),
        ({"id": identity, "reward": 2}, 400, "from -1 to 1"),
        ({"id": identity, "reward": "good"}, 400, "from -1 to 1"),
        ({"id": identity, "reward": True}, 400, "from -1 to 1"),
        ({"id": identity, "edit": " "}, 400, "as it should be"),
        ({"id": identity, "edit": "w3 " * 500}, 400, "the model reads"),
    ):
        found = teach(address, **body)
        assert (found[0], sentence in found[1]["error"]["message"]) == (status, True), found
    assert asked(f"{address}/v1/feedback", [1])[0] == 400
    assert told(address, "nobody/undo", body={})[0] == 404
    assert told(address, "fresh/history")[1]["events"] == []


def test_answers_that_are_not_kept_any_more_cannot_be_taught(begun):
    address = begun(count=1)
    first, _ = answer(address)
    second, _ = answer(address)
    status, found = teach(address, id=first, reward=1)
    assert status == 404
    assert "the last 1 answers" in found["error"]["message"]
    assert teach(address, id=second, reward=1)[0] == 200


def test_counters_tell_of_updates_by_adapter(begun):
    address = begun()
    teach(address, id=answer(address)[0], edit="w8 w5")
    with urllib.request.urlopen(f"{address}/metrics") as response:
        text = response.read().decode()
    assert 'moe_bias:updates_total{adapter="fresh"} 1.0' in text
    assert 'moe_bias:kl_to_base{adapter="fresh"}' in text


def test_a_server_that_is_started_again_has_learned_what_it_had(begun):
    address = begun()
    for _ in range(3):
        teach(address, id=answer(address)[0], edit="w8 w5 w9")
    now = answer(address)[1]
    history = told(address, "fresh/history")[1]["events"]
    second = begun()
    assert answer(second)[1] == now
    assert told(second, "fresh/history")[1]["events"] == history
