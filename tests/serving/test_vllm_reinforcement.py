"""`train rl --engine vllm`: it learns as with transformers, and an interrupted run ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_bias.cli import main
from moe_bias.evaluation.statistics import mean

from .conftest import WITHOUT_VLLM
from .samplers import RL_WORDS, write_ground

pytest.importorskip("vllm", reason=WITHOUT_VLLM)

COMMAND = [sys.executable, "-c", "from moe_bias.cli import main; raise SystemExit(main())", *RL_WORDS]
ADAPTER = "adapter_model.safetensors"
LAST = 4
"""Steps whose samples' rewards are compared with those of as many first steps."""


@pytest.fixture
def ground(tmp_path, monkeypatch):
    monkeypatch.chdir(write_ground(tmp_path))
    return tmp_path


def rewards(folder):
    """Of every sample, step by step."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    steps = max(line["step"] for line in lines)
    return [np.array([line["reward"] for line in lines if line["step"] == step]) for step in range(1, steps + 1)]


def test_it_learns_as_much_as_with_transformers(ground):
    found = {}
    for engine in ("transformers", "vllm"):
        words = [*RL_WORDS, "--engine", engine, "--steps", "16", "--show-every", "1", "--output", engine]
        assert main([*words, "--expert-rate", "3", "--prompts", "16"]) == 0
        steps = rewards(ground / engine)
        found[engine] = mean(np.concatenate(steps[-LAST:]))
        assert found[engine].low > mean(np.concatenate(steps[:LAST])).high
    assert found["vllm"].low < found["transformers"].high
    assert found["transformers"].low < found["vllm"].high


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(ground):
    words = [*COMMAND, "--engine", "vllm", "--steps", "6"]
    subprocess.run([*words, "--output", "whole"], check=True)
    process = subprocess.Popen([*words, "--output", "cut"], start_new_session=True)
    while not list((ground / "cut").glob("checkpoints/step-*3.*")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (ground / "cut" / ADAPTER).exists()
    subprocess.run([*words, "--output", "cut"], check=True)
    assert (ground / "cut" / ADAPTER).read_bytes() == (ground / "whole" / ADAPTER).read_bytes()
