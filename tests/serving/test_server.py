"""`moe-bias serve`, driven by OpenAI's own client: names, many requests at once, files that change, a kill."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from urllib.request import urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.served import ADAPTERS, WITHOUT_VLLM, write_adapter
from helpers.served_process import BASE, Server, started

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
import openai

NAMES = (BASE, *(f"{BASE}:{name}" for name in ADAPTERS))
PROMPTS = [f"{number} times {number + 3} is " for number in range(16)]


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    adapters = shutil.copytree(served[1], root / "adapters")
    with started(Server(served[0], adapters, root / "log")) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client


def complete(client, model, prompt, tokens=12, stream=False, **extra):
    choices = {"temperature": 0, "max_tokens": tokens, "extra_body": {"ignore_eos": True, **extra}}
    answer = client.completions.create(model=model, prompt=prompt, stream=stream, **choices)
    return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text


def replace_adapter(folder, made):
    """The weights, each file in one step, as training writes them."""
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        beside = folder / f".{file}"
        shutil.copy(made / file, beside)
        beside.replace(folder / file)


def test_every_adapter_is_a_model(client, server):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == set(NAMES)
    assert cards["tiny:routed"].parent == BASE
    assert cards["tiny:routed"].root == str(server.adapters / "routed")
    assert client.models.retrieve("tiny:static").id == "tiny:static"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny:absent")


def test_64_at_once_get_what_each_gets_alone(client):
    asked = list(product(NAMES, PROMPTS))
    alone = [complete(client, *each) for each in asked]
    assert len({tuple(alone[place : place + 16]) for place in range(0, len(asked), 16)}) == len(NAMES)
    with ThreadPoolExecutor(64) as pool:
        together = pool.map(lambda each: complete(client, *each[1], stream=each[0] % 2 == 0), enumerate(asked))
        assert list(together) == alone


def test_a_name_is_short_for_the_argument(client):
    named = [complete(client, "tiny:whole", prompt) for prompt in PROMPTS]
    assert named == [complete(client, BASE, prompt, vllm_xargs={"moe_bias": "whole"}) for prompt in PROMPTS]
    weak = [complete(client, "tiny:whole", prompt, vllm_xargs={"moe_bias_strength": 0.0}) for prompt in PROMPTS]
    assert weak == [complete(client, BASE, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("stream", [False, True])
def test_other_answers_know_names_too(client, stream):
    for model in NAMES:
        expected = complete(client, model, PROMPTS[0])
        turns = [{"role": "user", "content": PROMPTS[0]}]
        choices = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
        answer = client.chat.completions.create(model=model, messages=turns, stream=stream, **choices)
        if stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == expected
        else:
            assert answer.choices[0].message.content == expected


def test_several_adapters_by_name_by_mapping_and_by_text(client):
    """The last starts from the model's name, whose adapters have strengths of their own: 1 and 0.5."""
    for mapping in ({"routed": 1.0, "whole": 0.5}, {"whole": 0.5, "routed": 1.0}):
        given = [complete(client, BASE, prompt, vllm_xargs={"moe_bias": mapping}) for prompt in PROMPTS]
        text = json.dumps(mapping)
        assert given == [complete(client, BASE, prompt, vllm_xargs={"moe_bias": text}) for prompt in PROMPTS]
        assert given == [complete(client, "tiny:routed+whole", prompt) for prompt in PROMPTS]
        assert given != [complete(client, "tiny:routed", prompt) for prompt in PROMPTS]
    with pytest.raises(openai.BadRequestError, match="no adapter 'wole' on this server; there is 'whole'"):
        complete(client, "tiny:routed+wole", PROMPTS[0])


def test_the_page_of_metrics_counts_by_adapter(client, server):
    def counted(kind):
        page = urlopen(f"http://127.0.0.1:{server.port}/metrics").read().decode().splitlines()
        found = [line.split()[-1] for line in page if line.startswith(f'moe_bias:{kind}_total{{adapter="far"')]
        return float(found[0]) if found else 0

    before = counted("requests"), counted("tokens")
    for stream in (False, True):
        complete(client, "tiny:far", PROMPTS[0], 9, stream)
    complete(client, BASE, PROMPTS[0], vllm_xargs={"moe_bias": {"far": 0.5, "static": 1.0}})
    assert (counted("requests") - before[0], counted("tokens") - before[1]) == (3, 9 + 9 + 12)


def test_names_that_cannot_be_answered(client):
    with pytest.raises(openai.BadRequestError, match="there is no adapter 'routted' on this server; there is 'routed'"):
        complete(client, "tiny:routted", PROMPTS[0])
    with pytest.raises(openai.BadRequestError, match=r"the adapter 'whole' and vllm_xargs\.moe_bias for 'static'"):
        complete(client, "tiny:whole", PROMPTS[0], vllm_xargs={"moe_bias": "static"})
    with pytest.raises(openai.BadRequestError, match="beam search forgets"):
        complete(client, "tiny:whole", PROMPTS[0], use_beam_search=True)
    with pytest.raises(openai.NotFoundError, match="`large:whole` does not exist"):
        complete(client, "large:whole", PROMPTS[0])


def test_a_corrupt_adapter_is_refused_and_no_one_else_notices(client, server):
    expected = {each: complete(client, *each) for each in product(NAMES, PROMPTS[:4])}
    broken = shutil.copytree(server.adapters / "routed", server.adapters / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 1000)
    try:
        with ThreadPoolExecutor(32) as pool:
            refused = [pool.submit(complete, client, "tiny:broken", PROMPTS[0]) for _ in range(8)]
            answers = {each: pool.submit(complete, client, *each) for each in expected}
            assert {each: answer.result() for each, answer in answers.items()} == expected
            for request in refused:
                with pytest.raises(openai.BadRequestError, match="'broken' cannot be served"):
                    request.result()
    finally:
        shutil.rmtree(broken)


@pytest.mark.parametrize("kind", ["static", "linear"])
def test_an_adapter_is_replaced_under_load(client, server, served, tmp_path, kind):
    """Answers that have begun end with the old version, and new ones begin with the new."""
    model = AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32)
    write_adapter(tmp_path / "new", model, ADAPTERS[kind], seed=11)
    shutil.copytree(server.adapters / kind, server.adapters / f"changing-{kind}")
    name, prompt, tokens = f"tiny:changing-{kind}", PROMPTS[0], 200
    old = complete(client, name, prompt, tokens)
    others = {each: complete(client, *each) for each in product(NAMES, PROMPTS[:4])}
    with ThreadPoolExecutor(32) as pool:
        begun = client.completions.create(
            model=name, prompt=prompt, stream=True, temperature=0, max_tokens=tokens, extra_body={"ignore_eos": True}
        )
        first = next(begun).choices[0].text
        answers = {each: pool.submit(complete, client, *each) for each in others}
        replace_adapter(server.adapters / f"changing-{kind}", tmp_path / "new")
        new = pool.submit(complete, client, name, prompt, tokens)
        assert first + "".join(chunk.choices[0].text for chunk in begun) == old
        assert {each: answer.result() for each, answer in answers.items()} == others
        assert new.result() != old
    shutil.copytree(tmp_path / "new", server.adapters / f"same-{kind}")
    assert complete(client, f"tiny:same-{kind}", prompt, tokens) == new.result()


def test_an_adapter_of_another_model_is_refused_and_no_one_else_notices(client, server, served, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32)
    torch.nn.init.normal_(model.lm_head.weight)
    write_adapter(server.adapters / "foreign", model, ADAPTERS["linear"])
    try:
        with pytest.raises(openai.BadRequestError, match=r"'foreign' cannot be served: .* another output embedding"):
            complete(client, "tiny:foreign", PROMPTS[0])
        assert complete(client, "tiny:linear", PROMPTS[0])
    finally:
        shutil.rmtree(server.adapters / "foreign")


def test_killed_restarted_and_interrupted(client, server):
    """After a kill a new server starts in the same place and gives the same answers; Ctrl-C ends it in order."""
    before = [complete(client, *each) for each in product(NAMES, PROMPTS[:4])]
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(openai.APIConnectionError):
        complete(client, BASE, PROMPTS[0])
    server.start()
    assert [complete(client, *each) for each in product(NAMES, PROMPTS[:4])] == before
    assert server.end(signal.SIGINT) == 0
