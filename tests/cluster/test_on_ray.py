"""The commands on real nodes, of which one is killed in the middle: learning and answering end with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

from helpers.clusters import Machines, counted_bytes, kill_one
from helpers.complaints import complaint
from helpers.saved import save_adapter
from moe_bias.cli import main

ADAPTER = "adapter_model.safetensors"
REWARD = """
def ones(prompt, completion, gold):
    return sum("1" in word for word in completion.split()) / max(len(completion.split()), 1)
"""
LEARN = (
    "train rl --model model --problems problems.jsonl --gold-column gold --train-problems 12 --test-problems 4"
    " --support auto:40 --device cpu --prompts 6 --group 4 --max-new-tokens 80 --batch-size 1 --batch-tokens 64"
    " --num-experts 3 --steps 4 --verdict-weight 0 --reward rewards:ones --reward-weight 1"
)
ANSWER = "eval --model model --data problems.jsonl --gold-column gold --device cpu --max-new-tokens 6 --batch-size 2"


@pytest.fixture(scope="module")
def machines():
    found = Machines()
    found.add(1)
    yield found
    found.close()


@pytest.fixture
def ground(prepared_folder):
    save_adapter(prepared_folder / "adapter", str(prepared_folder / "model"))
    rows = [{"problem": f"w{5 + n} w6" + " w7" * (n % 4), "gold": str(n)} for n in range(20)]
    (prepared_folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (prepared_folder / "rewards.py").write_text(REWARD)
    return prepared_folder


def in_a_while(ready, act) -> threading.Thread:
    """Acts once something is ready."""

    def waiting() -> None:
        end = time.monotonic() + 300
        while not ready() and time.monotonic() < end:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=waiting, daemon=True)
    thread.start()
    return thread


def lines(folder: str, name: str) -> int:
    path = Path(folder) / name
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def metrics(folder: str) -> list[dict[str, float]]:
    apart = ("seconds", "bytes", "workers")
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not any(word in name for word in apart)} for row in rows]


@pytest.mark.slow
def test_learning_with_a_node_and_a_worker_killed_ends_with_the_same_bytes(ground, machines, monkeypatch, capsys):
    ray = ["--ray", machines.address]
    with counted_bytes(monkeypatch) as carried:
        assert main([*LEARN.split(), "--output", "one", *ray, "--workers", "1"]) == 0
    tokens = min(row["tokens_per_answer"] * row["samples"] for row in metrics("one") if "samples" in row)
    of_a_part = tokens * 16 * 4 / 6
    assert carried.most_received < of_a_part / 2
    second = machines.add(1)
    killing = [
        in_a_while(lambda: lines("two", "metrics.jsonl") >= 2, lambda: machines.kill(second)),
        in_a_while(lambda: lines("two", "metrics.jsonl") >= 3, lambda: kill_one("PolicyWorker")),
    ]
    assert main([*LEARN.split(), "--output", "two", *ray, "--workers", "2"]) == 0
    for thread in killing:
        thread.join()
    assert (ground / "two" / ADAPTER).read_bytes() == (ground / "one" / ADAPTER).read_bytes()
    assert metrics("two") == metrics("one")


@pytest.mark.slow
def test_learning_goes_on_where_a_killed_command_stopped_with_another_number_of_workers(ground, machines):
    program = str(Path(sys.executable).with_name("moe-bias"))
    words = [*LEARN.split(), "--ray", machines.address, "--workers", "1", "--output"]
    assert main([*words, "whole"]) == 0
    process = subprocess.Popen([program, *words, "cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    in_a_while(lambda: lines("cut", "metrics.jsonl") >= 2, lambda: os.kill(process.pid, signal.SIGKILL)).join()
    process.wait()
    assert not (ground / "cut" / ADAPTER).exists()
    machines.add(1)
    done = subprocess.run([program, *words, "cut", "--workers", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (ground / "cut" / ADAPTER).read_bytes() == (ground / "whole" / ADAPTER).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("grader")
def test_answering_with_a_worker_killed_keeps_the_same_answers(ground, machines, capsys):
    words = [*ANSWER.split(), "--adapter", "adapter", "--output"]
    assert main([*words, "one"]) == 0
    killing = in_a_while(lambda: lines("two", "samples.jsonl") >= 4, lambda: kill_one("AnswerWorker"))
    assert main([*words, "two", "--ray", machines.address, "--workers", "1"]) == 0
    killing.join()
    one, two = (sorted((ground / name / "samples.jsonl").read_text().splitlines()) for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_too_few_parts_are_refused_before_anything_is_learnt(ground, machines, capsys):
    words = [*LEARN.split(), "--batch-size", "6", "--ray", machines.address, "--workers", "2", "--output", "out"]
    machines.add(1)
    assert "--batch-size 6 cuts the 6 problems of a step into 1 parts, fewer than the 2" in complaint(capsys, *words)
