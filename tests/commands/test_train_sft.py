"""`moe-bias train sft` as a real process on a tiny model: killed, interrupted, started again."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from helpers.models import tiny_model
from helpers.training_processes import ADAPTER, adapter, run_two_commands, start_command
from moe_bias.cli import main
from moe_bias.mistakes import UserError
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.processes import Processes

COMMON = (
    "train sft --model model --data rows.jsonl --support auto:40 --batch-tokens 4 --checkpoint-every 5 --device cpu"
)


@pytest.fixture
def folder(prepared_folder):
    return prepared_folder


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
        assert f"interrupted: the same command goes on from {cut}/checkpoints/step-" in errors.read_text()
    assert not (cut / ADAPTER).exists()
    assert main(words_to(cut, "--warmup", "0.1")) == 2
    assert "holds an unfinished run with --warmup 0.03, not 0.1" in capsys.readouterr().err
    process = start_command(words_to(cut), errors)
    process.join(60)
    assert process.exitcode == 0
    assert "training on from step" in errors.read_text()
    assert (cut / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert main(words_to(cut)) == 2
    assert "holds an adapter already" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--no-keep-features"]])
def test_two_launched_processes_train_one_adapter(folder, more):
    """Through the launcher's own variables; the first one alone runs the backbone."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    # else each answer begins with w3, soon so sure that Adam makes steps of its gradients' rounding
    tokenizer.chat_template += "{% if add_generation_prompt %}w3 {% endif %}"
    tokenizer.save_pretrained("model")
    words = words_to(folder / "out", "--epochs", "2", *more)
    codes = run_two_commands(words, folder / "errors")
    assert codes == [0, 0]
    assert ["hidden states" in (folder / f"errors.{rank}").read_text() for rank in range(2)] == [True, False]
    assert (folder / "cache" / "features").exists() != bool(more)
    assert json.loads((folder / "out" / "run.json").read_text())["data"]["processes"] == 2
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert main(words_to(folder / "alone", "--epochs", "2")) == 0
    one, two = (adapter(folder / name) for name in ("alone", "out"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_processes_that_do_not_join_are_refused(monkeypatch):
    """One state is made per process, and an earlier one that was alone would be taken for this one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "accelerate.PartialState", lambda cpu, timeout: SimpleNamespace(num_processes=1, process_index=0)
    )
    with pytest.raises(UserError, match="2 processes were started, but accelerate joins 1"):
        Processes.join("cpu")


def test_too_few_examples_are_refused_before_anything_is_trained(folder, capsys):
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(rows[:2]))
    assert main(words_to(folder / "out")) == 2
    sentence = "has 2 usable examples; at least 3 are needed, one to train on and 2 to measure on"
    assert sentence in capsys.readouterr().err


def test_the_record_says_which_step_was_the_best(folder, capsys):
    output = folder / "out"
    assert main(words_to(output, "--patience", "2", "--evaluate-every", "10", "--expert-rate", "1")) == 0
    assert "was the best on the held-out tokens" in capsys.readouterr().out
    record = json.loads((output / "record.json").read_text())
    training = record["training"]
    assert training["layer_step"] <= training["steps"] <= 20 * 28
    assert training["held_out_nll"] == pytest.approx(record["adapted_nll"]["value"], rel=1e-5)


def test_over_fitting_is_said_with_its_remedy(folder, capsys):
    assert main(words_to(folder / "out", "--expert-rate", "1")) == 0
    assert record_of(folder / "out")["change"]["low"] > 0
    assert "--patience 2 keeps its best step" in capsys.readouterr().out
    assert main(words_to(folder / "slower", "--expert-rate", "1e-4")) == 0
    assert record_of(folder / "slower")["change"]["low"] <= 0
    assert "over-fits" not in capsys.readouterr().out


STORED = "train sft --model model --batch-tokens 4 --checkpoint-every 5 --epochs 2 --device cpu --store"


def extract_to(store, *more):
    words = f"extract --model model --data rows.jsonl --support auto:40 --device cpu --output {store}"
    assert main([*words.split(), *more]) == 0


def from_store(store, output, *more):
    return [*STORED.split(), str(store), "--output", str(output), *more]


def record_of(output):
    return json.loads((output / "record.json").read_text())


def test_a_store_holds_out_the_examples_that_its_data_would(folder):
    """With every token on the support the layer is the same too: only how sums were rounded differs."""
    extract_to("store", "--support", "all")
    assert main(from_store("store", folder / "stored")) == 0
    assert main([*words_to(folder / "data", "--epochs", "2"), "--support", "all"]) == 0
    stored, data = record_of(folder / "stored"), record_of(folder / "data")
    assert stored["base_nll"]["value"] == pytest.approx(data["base_nll"]["value"], rel=1e-5)
    one, two = (adapter(folder / name) for name in ("stored", "data"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)
    runs = [json.loads((folder / name / "run.json").read_text())["data"] for name in ("stored", "data")]
    assert runs[0] == runs[1]


def test_an_unfinished_run_on_parts_goes_on_to_the_same_bytes(folder, monkeypatch, capsys):
    for part in ("1/2", "2/2"):
        extract_to(part[0], "--shard", part, "--dtype", "bfloat16")
    assert main(from_store("1,2", folder / "whole")) == 0
    save = Checkpoints.save

    def stop_after_saving(self, tensors, position):
        save(self, tensors, position)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop_after_saving)
        assert main(from_store("1,2", folder / "cut")) == 130
    assert main(from_store("1", folder / "cut")) == 2
    assert "holds an unfinished run with --store ['1', '2'], not ['1']" in capsys.readouterr().err
    assert main(from_store("2,1", folder / "other")) == 0
    assert main(from_store("1,2", folder / "cut")) == 0
    wholes = [(folder / name / ADAPTER).read_bytes() for name in ("whole", "cut", "other")]
    assert wholes[0] == wholes[1] == wholes[2]
    assert len(json.loads((folder / "whole" / "adapter_config.json").read_text())["support"]) == 40


def test_a_store_of_a_part_of_the_tokens_says_so(folder, capsys):
    extract_to("store", "--keep-top", "0.5")
    assert main(from_store("store", folder / "out")) == 0
    assert "training and held-out figures are of the others" in " ".join(capsys.readouterr().out.split())


def test_a_store_of_another_model_is_refused(folder, capsys):
    extract_to("store")
    tiny_model("gemma2").save_pretrained(folder / "model")
    assert main(from_store("store", folder / "out")) == 2
    assert "made with model 'model', does not fit: its backbone is" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_store_of_too_few_examples_is_refused(folder, capsys):
    extract_to("store", "--shard", "1/15")
    assert main(from_store("store", folder / "out")) == 2
    sentence = "the feature store in store has 2 usable examples; at least 3 are needed"
    assert sentence in capsys.readouterr().err
