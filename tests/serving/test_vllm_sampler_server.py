"""The sampler and `train rl` against vLLM's own server in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.served import WITHOUT_VLLM
from moe_bias.adapter import read_adapter
from moe_bias.backbone import find_head
from moe_bias.cli import main
from moe_bias.mistakes import UserError

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from helpers.asking import prompts
from helpers.samplers import CHOICES, RL_WORDS, check_against_transformers, completions, layer_of, write_ground
from moe_bias.rollout.engines import ServerEngine
from moe_bias.rollout.vllm import VllmSampler
from moe_bias.serving.recording import RowLayout, Spool

PATIENCE = 300
"""Seconds that a start may take; several processes import vLLM."""

RL = [*RL_WORDS, "--steps", "2", "--output", "out", "--engine", "vllm"]


def is_up(url):
    try:
        return urlopen(url + "/health").status == 200
    except URLError:
        return False


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a model, problems and rewards, and the folders that server and client share."""
    root = write_ground(tmp_path_factory.mktemp("ground"))
    (root / "adapters").mkdir()
    (root / "spool").mkdir()
    return root


@pytest.fixture(scope="module")
def url(ground):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = "--dtype float32 --max-model-len 256 --kv-cache-memory-bytes 16777216 --enforce-eager --block-size 32"
    words += " --logprobs-mode processed_logprobs --no-enable-chunked-prefill --distributed-executor-backend uni"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ground / "model")]
    folders = {"MOE_BIAS_ADAPTERS": str(ground / "adapters"), "MOE_BIAS_SPOOL": str(ground / "spool")}
    log = ground / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), *words.split()],
            env={**os.environ, **folders},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        ends = time.monotonic() + PATIENCE
        while not is_up(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < ends, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)


@pytest.fixture
def here(ground, monkeypatch):
    monkeypatch.chdir(ground)
    monkeypatch.setenv("MOE_BIAS_ADAPTERS", "adapters")
    monkeypatch.setenv("MOE_BIAS_SPOOL", "spool")
    return ground


def test_a_server_gives_the_same_as_an_engine_here(url, here):
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
    head = find_head(model)[1]
    spool = Spool(here / "spool", RowLayout.of_model(head.hidden_size, head.dtype))
    sampler = VllmSampler(ServerEngine(url), model, head, here / "adapters", spool)
    asked = prompts(8)
    for seed in (1, 2):  # the weights change without a restart
        layer = layer_of(seed=seed)
        rollouts = sampler.sample(asked, layer, replace(CHOICES, temperature=0.8), seed)
        check_against_transformers(model, layer, asked, rollouts)
    again = sampler.sample(asked, layer, replace(CHOICES, temperature=0.8), seed)
    assert completions(again) == completions(rollouts)
    narrow = replace(spool, layout=RowLayout(head.hidden_size, torch.bfloat16))
    with pytest.raises(UserError, match=r"hidden states are 64 numbers of float32, need \d+"):
        replace(sampler, spool=narrow).sample(asked, layer, CHOICES, 0)
    sampler.close()
    assert not list((here / "adapters").iterdir())
    assert not list((here / "spool").iterdir())


@pytest.mark.parametrize("kind", ["--experts free", "--experts linear --reach vocabulary"])
def test_reinforcement_learning_samples_from_a_server(url, here, capsys, kind):
    assert main([*RL, *kind.split(), "--output", kind, "--endpoint", url]) == 0
    assert "held-out accuracy, trained" in capsys.readouterr().out
    lines = [json.loads(line) for line in (here / kind / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert max(line["sampler_gap"] for line in lines[1:]) < 1e-4
    _, tensors = read_adapter(here / kind)
    assert any(name.endswith(("experts", "directions")) and tensor.any() for name, tensor in tensors.items())
    assert not list((here / "adapters").iterdir())
    assert not list((here / "spool").iterdir())


@pytest.mark.parametrize(
    ("more", "variables", "sentence"),
    [
        ("--endpoint URL", {"MOE_BIAS_SPOOL": "nowhere"}, "--endpoint needs MOE_BIAS_SPOOL to name the folder that"),
        ("--endpoint http://127.0.0.1:9/v1", {}, "http://127.0.0.1:9/v1 names no models (Connection error"),
        ("--engine transformers --endpoint URL", {}, "needs --engine vllm; give both"),
        ("--first-token-only", {}, "--first-token-only needs --engine transformers"),
        ("--endpoint URL --seed 1 --model other", {}, "the engine's hidden states are"),
    ],
)
def test_engines_that_cannot_be_had_are_refused(url, here, monkeypatch, capsys, more, variables, sentence):
    monkeypatch.setattr("moe_bias.rollout.engines.RETRIES", 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "other" in more and not (here / "other").exists():
        other = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        torch.nn.init.normal_(other.model.layers[0].mlp.down_proj.weight)
        other.save_pretrained("other")
        for file in (here / "model").glob("*token*"):
            (here / "other" / file.name).write_bytes(file.read_bytes())
    assert main([*RL, "--output", "refused", *more.replace("URL", url).split()]) == 2
    assert re.search(re.escape(sentence), capsys.readouterr().err)
    assert not (here / "refused" / "metrics.jsonl").exists() or "other" in more
