"""`moe-bias serve --learn` on vLLM: what is said of an answer is learned, and the next one is made with it."""

import json
import os
import signal
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.served import WITHOUT_VLLM
from helpers.served_process import BASE, Server, started

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
import psutil

from moe_bias.adapter.files import save_layer
from moe_bias.backbone import find_head, hidden_states
from moe_bias.config import LayerConfig
from moe_bias.learning.journal import entries

ALICE, BOB = "alice-secret-0123", "bob-secret-456789"
QUESTION, WANTED = "the capital of France is ", "Paris, captain"
ANSWER_TOKENS = 24


@pytest.fixture(scope="module")
def model(served):
    return AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def server(served, model, tmp_path_factory):
    """Alice and Bob have an adapter each that has learned nothing."""
    root = tmp_path_factory.mktemp("learning")
    torch.manual_seed(0)
    layer, ids = find_head(model)[1].layer(LayerConfig(support=tuple(range(60)))), torch.arange(2, 40)[None]
    layer.calibrate(hidden_states(model, ids, torch.ones_like(ids)))
    for name in ("alice", "bob"):
        save_layer(layer, root / "adapters" / name, model)
    (root / "keys.json").write_text(json.dumps({ALICE: "alice", BOB: "bob"}))
    more = ("--learn", root / "learned", "--key-file", root / "keys.json")
    with started(Server(served[0], root / "adapters", root / "log", more)) as running:
        yield running


@pytest.fixture
def journal(server):
    return server.adapters.parent / "learned" / "journals" / "alice" / "journal.bin"


def asked(server, path, body=None, key=None):
    """Status and reply."""
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def answer(server, adapter="alice", temperature=0, question=QUESTION, **choices):
    """The id and the text of an answer."""
    turns = [{"role": "user", "content": question}]
    body = {"model": f"{BASE}:{adapter}", "messages": turns, "temperature": temperature, "max_tokens": ANSWER_TOKENS}
    status, found = asked(server, "/v1/chat/completions", {**body, "ignore_eos": True, **choices})
    assert status == 200, found
    return found["id"], found["choices"][0]["message"]["content"]


def teach(server, key=ALICE, **body):
    return asked(server, "/v1/feedback", body, key)


def check_states(journal, served, model, question, edit):
    """The last lesson's better answer is the edited text, and has the states that transformers computes for it."""
    lesson = list(entries(journal))[-1].tensors
    better_T, tokenizer = lesson["answer"] == 0, AutoTokenizer.from_pretrained(served[0])
    prompt, tokens = tokenizer(question).input_ids, lesson["token"][better_T].tolist()
    assert tokens == [*tokenizer(edit).input_ids, 1]
    with torch.no_grad():
        states_LD = model.model(torch.tensor([[*prompt, *tokens[:-1]]])).last_hidden_state[0]
    torch.testing.assert_close(lesson["hidden"][better_T], states_LD[len(prompt) - 1 :], atol=1e-4, rtol=1e-4)


def test_an_edit_is_learned_from_states_that_are_those_of_transformers(server, served, model, journal):
    before = answer(server, "bob")[1]
    for number in range(1, 5):
        identity, text = answer(server, question=f"{QUESTION}({number}) ")
        edit = text[: 3 * number] + WANTED  # begins as the answer does, so that some states are known already
        status, told = teach(server, id=identity, edit=edit)
        assert (status, told["applied"]) == (200, number != 3), told  # which is kept to measure by
        check_states(journal, served, model, f"{QUESTION}({number}) ", edit)
    assert told["version"] >= 2
    assert answer(server, "bob")[1] == before
    status, history = asked(server, "/v1/adapters/alice/history", key=ALICE)
    assert [event["number"] for event in history["events"]][-4:] == [1, 2, 3, 4]


def test_an_edit_whose_keys_are_in_the_cache_is_computed_apart_from_it(server, served, model, journal):
    for number in range(2):  # the first fills a block of the cache with positions that the second asks for
        edit = f"{'Paris, captain. ' * 9}({number})"
        status, told = teach(server, id=answer(server)[0], edit=edit)
        assert status == 200, told
        check_states(journal, served, model, QUESTION, edit)


def test_a_reward_and_a_better_answer(server):
    first = answer(server, temperature=1.0)[0]
    second = answer(server, temperature=1.0, seed=5)[0]
    assert teach(server, id=first, reward=0.5)[0] == 200
    assert teach(server, id=second, prefer=first)[0] == 200
    body = {"model": f"{BASE}:alice", "prompt": QUESTION, "max_tokens": 5, "temperature": 0}
    completed = asked(server, "/v1/completions", body)[1]
    assert teach(server, id=completed["id"], reward=-1)[0] == 200


def test_who_may_teach_what(server):
    identity = answer(server)[0]
    assert teach(server, key=BOB, id=identity, reward=1)[0] == 404
    assert teach(server, key=None, id=identity, reward=1)[0] == 404
    plain = asked(server, "/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": "x"}]})[1]
    status, told = teach(server, id=plain["id"], reward=1)
    assert (status, "there is no answer" in told["error"]["message"]) == (404, True)
    status, cards = asked(server, "/v1/adapters", key=BOB)
    assert {card["name"]: card["learns"] for card in cards["adapters"]} == {"alice": False, "bob": True}
    origin = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/adapters", headers={"origin": "http://elsewhere.example"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(origin)
    page = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read().decode()
    assert 'moe_bias:kl_to_base{adapter="alice"}' in page


def test_what_was_learned_is_there_after_a_kill_and_can_be_undone(server, journal):
    learned = answer(server)[1]
    events = len(list(entries(journal)))
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server.start()
    assert answer(server)[1] == learned
    assert len(list(entries(journal))) == events
    status, told = asked(server, "/v1/adapters/alice/undo", {}, ALICE)
    assert (status, told["published"]) == (200, True)


def test_the_process_that_learns_is_killed_and_another_goes_on(server):
    identity = answer(server)[0]
    os.kill(learning_process(server), signal.SIGKILL)
    assert teach(server, id=identity, reward=1)[0] == 200
    assert server.end(signal.SIGINT) == 0


def learning_process(server):
    """A child of the server's that holds no engine: the one of low priority."""
    (found,) = [child.pid for child in psutil.Process(server.process).children() if child.nice() >= 10]
    return found
