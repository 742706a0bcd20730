"""`moe-bias train sft` as a real process on a tiny model: killed, interrupted, started again."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from moe_bias.cli import main
from moe_bias.config import UserError
from moe_bias.training.processes import Processes
from test_sweep import folder as prepared_folder
from training_processes import ADAPTER, adapter, run_two_commands, start_command

folder = prepared_folder
COMMON = (
    "train sft --model model --data rows.jsonl --support auto:40 --batch-tokens 4 --checkpoint-every 5 --device cpu"
)


def words_to(output, *more):
    epochs = [] if "--epochs" in more else ["--epochs", "20"]
    return [*COMMON.split(), *epochs, "--output", str(output), *more]


def stopped_by(number, output, errors):
    """The command, sent this signal after its first checkpoint; returns its exit code."""
    process = start_command(words_to(output), errors)
    end = time.monotonic() + 60
    while not list(output.glob("checkpoints/step-*")) and process.is_alive() and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_goes_on_to_the_same_bytes(folder, capsys, number):
    whole, cut, errors = folder / "whole", folder / "cut", folder / "errors"
    process = start_command(words_to(whole), errors)
    process.join(60)
    assert process.exitcode == 0
    code = stopped_by(number, cut, errors)
    assert code == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert f"interrupted: run the same command again to go on from {cut}/checkpoints/step-" in errors.read_text()
    assert not (cut / ADAPTER).exists()
    assert main(words_to(cut, "--expert-rate", "0.01")) == 2
    assert "holds an unfinished run with --expert-rate 0.05, not 0.01" in capsys.readouterr().err
    process = start_command(words_to(cut), errors)
    process.join(60)
    assert process.exitcode == 0
    assert "training on from step" in errors.read_text()
    assert (cut / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert main(words_to(cut)) == 2
    assert "holds an adapter already" in capsys.readouterr().err


def test_two_launched_processes_train_one_adapter(folder):
    """Through the launcher's own variables, and without naming a device."""
    words = words_to(folder / "out", "--epochs", "2")
    codes = run_two_commands(words, folder / "errors")
    assert codes == [0, 0]
    assert json.loads((folder / "out" / "run.json").read_text())["data"]["processes"] == 2
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert main(words_to(folder / "alone", "--epochs", "2")) == 0
    one, two = (adapter(folder / name) for name in ("alone", "out"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in one)


def test_processes_that_do_not_join_are_refused(monkeypatch):
    """One state is made per process, and an earlier one that was alone would be taken for this one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(num_processes=1, process_index=0))
    with pytest.raises(UserError, match="2 processes were started, but accelerate joins 1"):
        Processes.join("cpu")


def test_too_few_examples_are_refused_before_anything_is_trained(folder, capsys):
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(rows[:2]))
    assert main(words_to(folder / "out")) == 2
    sentence = "has 2 usable examples of 2; at least 3 are needed, one to train on and 2 to measure on"
    assert sentence in capsys.readouterr().err


def test_the_record_says_which_step_was_the_best(folder, capsys):
    output = folder / "out"
    assert main(words_to(output, "--patience", "2", "--evaluate-every", "10", "--expert-rate", "1")) == 0
    assert "was the best on the held-out tokens" in capsys.readouterr().out
    record = json.loads((output / "record.json").read_text())
    training = record["training"]
    assert training["layer_step"] <= training["steps"] <= 20 * 28
    assert training["held_out_nll"] == pytest.approx(record["adapted_nll"]["value"], rel=1e-5)
