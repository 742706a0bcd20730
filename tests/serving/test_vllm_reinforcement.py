"""`train rl --engine vllm`: it learns as with transformers, and an interrupted run ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers.samplers import RL_WORDS, write_ground
from helpers.served import WITHOUT_VLLM
from moe_bias.cli import main
from moe_bias.evaluation.statistics import mean

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)

COMMAND = [sys.executable, "-c", "from moe_bias.cli import main; raise SystemExit(main())", *RL_WORDS]
ADAPTER = "adapter_model.safetensors"
SEEDS = 5
LAST = 3
"""Steps whose mean reward is compared with that of as many first steps."""


@pytest.fixture
def ground(tmp_path, monkeypatch):
    monkeypatch.chdir(write_ground(tmp_path))
    return tmp_path


def mean_rewards(folder):
    """Of the samples of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["reward"] for line in lines if "reward" in line])


@pytest.mark.slow
def test_it_learns_as_much_as_with_transformers(ground):
    found = {"transformers": [], "vllm": []}
    for engine, ends in found.items():
        for seed in range(SEEDS):
            output = f"{engine}-{seed}"
            words = [*RL_WORDS, "--engine", engine, "--seed", str(seed), "--steps", "12", "--output", output]
            assert main([*words, "--expert-rate", "3", "--prompts", "16"]) == 0
            rewards = mean_rewards(ground / output)
            assert rewards[-LAST:].mean() > 2 * rewards[:LAST].mean()
            ends.append(rewards[-LAST:].mean())
    ours, theirs = (mean(np.array(ends)) for ends in (found["vllm"], found["transformers"]))
    assert max(ours.low, theirs.low) < min(ours.high, theirs.high), found


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
