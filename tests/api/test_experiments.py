"""Comparisons in Python: the figures of the commands, what they show, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_bias as mb
from moe_bias.adapter.saved import WEIGHTS_FILE
from moe_bias.cli import main

OPTIONS = "--model model --device cpu --data rows.jsonl --support auto:40 --held-out 0.3 --batch-tokens 8 --epochs 2"
CONFIG = {"batch_tokens": 8, "epochs": 2, "lora_rank": 2, "lora_batch_size": 4}
SUMMING = """
import moe_bias as mb


class Sums:
    name = "sums"

    def problems(self, count, seed):
        return [mb.Problem(f"w{n % 40} w{n // 40}", f"w{n % 40}", f"w{n % 40} w7", {}) for n in range(count)]

    def verify(self, problems, completions):
        right = [len(text) % 2 == 0 for text in completions]
        return [mb.Verdict("correct" if one else "wrong", None, float(one)) for one in right]
"""
FOLDERS = ("of-python", "of-the-command")
MEASURED_BY_THE_CLOCK = ("seconds", "updating_share", "peak_bytes")


@pytest.fixture
def base(prepared_folder) -> mb.Frozen:
    return mb.load("model", device="cpu")


@pytest.fixture
def data(base) -> mb.Data:
    return mb.extract(base, "rows.jsonl", support="auto:40", held_out=0.3)


def figures(folder: str) -> list[dict]:
    rows = json.loads(Path(folder, "table.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name not in MEASURED_BY_THE_CLOCK} for row in rows]


def test_arms_are_those_of_the_command(base, data):
    words = ["arms", *OPTIONS.split(), "--seeds", "3", "--arms", "lora-head", "--lora-rank", "2"]
    assert main([*words, "--lora-batch-size", "4", "--output", "of-the-command"]) == 0
    report = mb.arms(base, data, mb.ArmsConfig(**CONFIG), arms=["lora-head"], seeds=[3], output="of-python")
    for ours, theirs in zip(figures("of-python"), figures("of-the-command"), strict=True):
        if ours["name"] == "lora-time":  # its budget is measured by the clock
            assert ours.keys() == theirs.keys()
        else:
            assert ours == theirs
    assert [row.name for row in report.arms] == ["base model", "moe-bias", "lora-head", "lora-tokens", "lora-time"]
    assert report["lora-head"].change == report.arms[2].change
    assert "change to moe-bias" in str(report)
    assert "second lines" not in str(report)
    assert max(map(len, str(report).splitlines())) <= 100
    assert report._repr_html_().count("<tr>") == 6
    assert list(report.frame()["arm"]) == [row.name for row in report.arms]
    assert report.frame()["low, to moe-bias, high"][2] == report.arms[2].change["low"].high
    assert len(list(Path("of-python/arms").iterdir())) == 5


def test_a_sweep_is_that_of_the_command(base, data):
    words = ["sweep", *OPTIONS.split(), "--seeds", "1", "--grid", "num_experts=2,4 support=auto:40,all"]
    assert main([*words, "--base", "num_experts=4 support=all", "--output", "of-the-command"]) == 0
    grid, config = {"num_experts": [2, 4], "support": ["auto:40", "all"]}, mb.SFTConfig(batch_tokens=8, epochs=2)
    against = "num_experts=4 support=all"
    report = mb.sweep(base, data, grid, config, against=against, seeds=[1], output="of-python")
    assert figures("of-python") == figures("of-the-command")
    assert report.base == against
    assert report.held_out_tokens == len(data.prepared.held_out)


def test_a_comparison_by_rewards_is_that_of_the_command(base, prepared_folder):
    Path("summing.py").write_text(SUMMING)
    shape = "--support all --num-experts 2 --expert-rank 2 --steps 2 --prompts 3 --group 4 --max-new-tokens 4"
    counts = "--train-problems 12 --test-problems 4 --warm-problems 6 --warm-epochs 2 --evaluate-every 1"
    words = [
        "compare",
        *["--model", "model", "--device", "cpu", "--task", "summing:Sums"],
        *shape.split(),
        *counts.split(),
    ]
    which = ["base", "static", "moe-bias"]
    assert main([*words, "--seeds", "0,1", "--arms", ",".join(which), "--output", "of-the-command"]) == 0
    config = mb.CompareConfig(
        **{"support": "all", "num_experts": 2, "expert_rank": 2, "steps": 2, "prompts": 3, "group": 4},
        **{"max_new_tokens": 4, "warm_problems": 6, "warm_epochs": 2, "evaluate_every": 1},
    )
    counts = {"train_problems": 12, "test_problems": 4}
    report = mb.compare(
        base, "summing:Sums", config, arms=which, seeds=[0, 1], shifted="summing:Sums", output="of-python", **counts
    )
    for ours, theirs in zip(figures("of-python"), figures("of-the-command"), strict=True):
        assert {name: value for name, value in ours["accuracy"].items() if "shifted" not in name} == theirs["accuracy"]
        assert ours["accuracy"].keys() - theirs["accuracy"].keys() == {"shifted", "shifted before"}
        for name in ("by_seed", "change", "parameters", "sampled_tokens", "seeds"):
            assert ours[name] == theirs[name]
    first, second = (load_file(f"{folder}/adapters/moe-bias-seed1/{WEIGHTS_FILE}") for folder in FOLDERS)
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert mb.load_layer("of-python/adapters/static-seed0", base).config.num_experts == 1
    assert [step["step"] for step in report.curve] == [0, 1, 2]
    assert set(report.curve[2]) == {"step", "static", "moe-bias"}
    assert report.curve[2]["moe-bias"] == pytest.approx(report["moe-bias"].accuracy["held out"].value)
    with pytest.raises(mb.UserError, match="an unfinished run with `test_problems` 4, not 5"):
        mb.compare(
            base, "summing:Sums", config, shifted="summing:Sums", output="of-python", train_problems=12, test_problems=5
        )
    assert "to base" in str(report)
    assert list(report.frame()["held out, %"]) == [100 * row.accuracy["held out"].value for row in report.arms]
    assert "<svg" in report._repr_html_()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda base, data: mb.arms(base, "rows.jsonl"), "`data` is 'rows.jsonl'; give what moe_bias.extract"),
        (lambda base, data: mb.arms(base, data, mb.SFTConfig()), "`config` is a SFTConfig; give moe_bias.ArmsConfig"),
        (lambda base, data: mb.arms(base, data, arms=["dense"]), "`arms` names 'dense'; choose among moe-bias, static"),
        (lambda base, data: mb.arms(base, data, seeds=[]), "`seeds` is empty; give at least one"),
        (lambda base, data: mb.arms(base, data, seeds=[-1]), "with seed = -1: seed is -1: "),
        (lambda base, data: mb.sweep(base, data, {"num_expert": [1]}), "`grid` has 'num_expert', which is none of"),
        (lambda base, data: mb.sweep(base, data, {}), "`grid` is empty; give at least one setting"),
        (lambda base, data: mb.compare(base, "products", arms=["stat"]), "`arms` has 'stat', which is none of base,"),
        (lambda base, data: mb.compare("bundled", "products"), "`base` is 'bundled', no frozen model;"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_argument(base, data, call, sentence):
    with pytest.raises(mb.UserError) as caught:
        call(base, data)
    assert sentence in str(caught.value)


def test_arms_of_another_config_or_other_data_are_not_gone_on_with(base, data):
    config, few = (
        mb.ArmsConfig(support="auto:40", **CONFIG),
        {"arms": ["static"], "seeds": [0], "lora": False, "output": "out"},
    )
    report = mb.arms(base, data, config, **few)
    assert mb.arms(base, data, config, **few).arms == report.arms
    with pytest.raises(mb.UserError, match="an unfinished run with `epochs` 2, not 3"):
        mb.arms(base, data, mb.ArmsConfig(support="auto:40", **{**CONFIG, "epochs": 3}), **few)
    others = mb.extract(base, data.store.folders[0], held_out=0.3, seed=1)
    with pytest.raises(mb.UserError, match="an unfinished run with `held_out_rows` "):
        mb.arms(base, others, config, **few)
    rows = [{"prompt": f"w{n} w4", "completion": "w5 w6"} for n in range(9)]
    with pytest.raises(mb.UserError, match="an unfinished run with `data` "):
        mb.arms(base, mb.extract(base, rows, support="auto:40", held_out=0.3), config, **few)
