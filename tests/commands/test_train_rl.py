"""`moe-bias train rl` and `moe-bias compare` as commands on a tiny model: killed, started again, refused."""

import json
import os
import signal
import time

import pytest

import moe_bias as mb
from helpers.saved import save_adapter
from helpers.training_processes import ADAPTER, start_command
from moe_bias.adapter import read_adapter
from moe_bias.adapter.saved import adapter_of_any_method
from moe_bias.cli import main
from moe_bias.config import TaskConfig
from moe_bias.training import budget
from moe_bias.training.problems import task_of

REWARD = """
def first_letters(prompt, completion, gold):
    return sum("1" in word for word in completion.split()) / max(len(completion.split()), 1)

def raises(prompt, completion, gold):
    if len(completion) % 2:
        raise KeyError("[/b][link=x]" + completion)
    return 1.0

def too_much(prompt, completion, gold):
    return 7
"""
COMMON = (
    "--model model --problems problems.jsonl --gold-column gold --train-problems 12 --test-problems 4"
    " --support auto:40 --device cpu --prompts 3 --group 4 --max-new-tokens 5 --batch-tokens 16 --num-experts 3"
)
REWARDED = "--verdict-weight 0 --reward rewards:first_letters --reward-weight 1"


@pytest.fixture
def folder(prepared_folder):
    return prepared_folder


@pytest.fixture
def ground(folder):
    rows = [{"problem": f"w{5 + n} w6", "gold": str(n), "solution": f"w9 \\boxed{{{n}}}"} for n in range(20)]
    (folder / "problems.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def words_to(output, *more, reward=REWARDED, steps=6):
    return ["train", "rl", *COMMON.split(), *reward.split(), "--steps", str(steps), "--output", str(output), *more]


def test_a_killed_run_goes_on_to_the_same_bytes(ground):
    whole, cut, errors = ground / "whole", ground / "cut", ground / "errors"
    process = start_command(words_to(whole), errors)
    process.join(120)
    assert process.exitcode == 0, errors.read_text()
    process = start_command(words_to(cut), errors)
    end = time.monotonic() + 60
    while not list(cut.glob("checkpoints/step-*2.*")) and process.is_alive() and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not (cut / ADAPTER).exists()
    (cut / "metrics.jsonl").unlink()  # the run goes on without it
    process = start_command(words_to(cut), errors)
    process.join(120)
    assert process.exitcode == 0, errors.read_text()
    assert (cut / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 6
    assert steps[0] >= 3


def test_record_samples_and_adapter(ground, capsys):
    assert main(words_to(ground / "out", "--show-every", "2", steps=2)) == 0
    record = json.loads((ground / "out" / "record.json").read_text())
    assert set(record["accuracy"]) == {"base", "start", "trained"}
    assert record["position"]["step"] == 2
    assert record["position"]["sampled_tokens"] > 0
    samples = [json.loads(line) for line in (ground / "out" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {2}
    assert len(samples) % 12 == 0
    config, tensors = read_adapter(ground / "out")
    assert len(config.support) == 40
    assert any("directions" in name and tensor.abs().sum() > 0 for name, tensor in tensors.items())
    assert "held-out accuracy, trained" in capsys.readouterr().out
    assert main(words_to(ground / "out", steps=2)) == 2
    assert "holds an adapter already" in capsys.readouterr().err


def test_length_is_a_reward_of_the_command_of_its_file_and_of_python(ground, capsys):
    """And the record has accuracy and tokens apart."""
    shaped = [*REWARDED.split(), "--length-penalty", "5", "--token-budget", "4"]
    assert main(words_to(ground / "out", reward=" ".join(shaped), steps=2)) == 0
    said = "".join(capsys.readouterr())
    record = json.loads((ground / "out" / "record.json").read_text())
    lengths, tokens = record["lengths"], {name: value["value"] for name, value in record["tokens"].items()}
    assert tokens == {name: pytest.approx(sum(row) / 4) for name, row in lengths.items()}
    assert record["tokens_change"]["value"] == pytest.approx(tokens["trained"] - tokens["start"])
    assert f"{tokens['trained']:.0f} [" in said
    assert "tokens an answer" in said
    metrics = [json.loads(line) for line in (ground / "out" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["held_out_tokens"] == tokens["trained"]
    (ground / "moe-bias.toml").write_text("[reward]\nlength_penalty = 5\ntoken_budget = 4")
    assert main(words_to(ground / "file", steps=2)) == 0
    base = mb.load("model", device="cpu")
    task = task_of(TaskConfig(problems="problems.jsonl", gold_column="gold"))
    rewards = mb.RewardConfig(verdict_weight=0, reward_weight=1, length_penalty=5, token_budget=4)
    sizes = {"prompts": 3, "group": 4, "max_new_tokens": 5, "batch_tokens": 16, "num_experts": 3}
    config = mb.RLConfig(steps=2, support="auto:40", **sizes)
    numbers = {"train_problems": 12, "test_problems": 4}
    mb.train_rl(
        base, task, None, config, reward="rewards:first_letters", rewards=rewards, output=ground / "python", **numbers
    )
    bytes_of = [(ground / name / ADAPTER).read_bytes() for name in ("out", "file", "python")]
    assert len(set(bytes_of)) == 1
    (ground / "moe-bias.toml").unlink()
    assert main(words_to(ground / "plain", steps=2)) == 0
    assert (ground / "plain" / ADAPTER).read_bytes() != bytes_of[0]
    assert main(["report", "out", "--output", "page"]) == 0
    assert "An answer takes" in (ground / "page" / "report.md").read_text()


def test_a_run_starts_from_an_adapter_and_keeps_its_support(ground, capsys):
    adapter = save_adapter(ground / "adapter", "model")
    assert main(words_to(ground / "out", "--adapter", adapter, steps=1)) == 0
    assert read_adapter(ground / "out")[0].support == read_adapter(adapter)[0].support
    capsys.readouterr()
    config = json.loads((ground / "adapter" / "adapter_config.json").read_text())
    (ground / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "hidden_size": 8}))
    assert main(words_to(ground / "other", "--adapter", adapter)) == 2
    assert "'adapter'" in (said := capsys.readouterr().err) or "adapter" in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--temperature", "0"], "greedy answers are all alike and teach nothing"),
        (["--top-p", "0.9"], "of another distribution; give 1"),
        (["--reward", "rewards:nothing"], "rewards has no nothing"),
        (["--reward", "rewards:too_much"], "too_much gave 7, which is not a number from 0 to 1"),
        (["--form", "(", "--form-weight", "1"], "is not a regular expression"),
        (["--token-budget", "5"], "--token-budget 5 is not below the limit --max-new-tokens 5, so it would change"),
        (["--train-problems", "99"], "only 20 different problems, 103 were asked for"),
        (["--problems", "empty.jsonl"], "empty.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_before_any_sampling(ground, capsys, more, sentence):
    (ground / "empty.jsonl").write_text("")
    assert main(words_to(ground / "out", *more)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "samples" not in said.replace("first sample", "")


def test_a_reward_that_raises_is_counted_and_shown(ground, capsys):
    reward = "--verdict-weight 0 --reward rewards:raises --reward-weight 1"
    code = main(words_to(ground / "out", reward=reward, steps=1))
    said = capsys.readouterr()
    assert code == 0 or "failed on a first sample" in said.err
    assert "rewards:raises failed on" in said.out + said.err
    assert "[/b][link=x]w" in said.out + said.err
    assert "KeyError" in said.out + said.err


def test_equal_rewards_stop_with_the_success_rate(ground, capsys):
    assert main(words_to(ground / "out", "--equal-steps", "2", reward="--verdict-weight 1")) == 2
    assert "in 2 steps in a row no problem had samples of different rewards" in capsys.readouterr().err


def test_bad_golds_are_said(ground, capsys):
    rows = [json.loads(line) for line in (ground / "problems.jsonl").read_text().splitlines()]
    (ground / "problems.jsonl").write_text("\n".join(json.dumps({**row, "gold": "\\frac{1}{"}) for row in rows))
    assert main(words_to(ground / "out", steps=1)) == 0
    said = capsys.readouterr()
    assert "0% right, 100% with a bad gold" in said.out + said.err
    assert "4 of 4 problems have a gold answer that the grader cannot read ('\\\\frac{1}{, " in said.out
    assert main(words_to(ground / "equal", "--equal-steps", "1", reward="--verdict-weight 1")) == 2
    assert "of the last samples are right, " in (error := capsys.readouterr().err)
    assert "100% have a bad gold; start from" in error


def test_compare_runs_arms_once_and_prints_them(ground, capsys):
    words = [
        "compare",
        *COMMON.split(),
        *REWARDED.split(),
        *["--steps", "2", "--seeds", "0", "--warm-problems", "6", "--output", "out"],
    ]
    words += ["--warm-epochs", "2", "--arms", "base,first-token,static,moe-bias"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert all(name in first for name in ("first-token", "static", "to base", "gained", "tokens"))
    records = sorted(path.name for path in (ground / "out" / "arms").iterdir())
    assert records == ["base-seed0.json", "first-token-seed0.json", "moe-bias-seed0.json", "static-seed0.json"]
    times = [path.stat().st_mtime_ns for path in (ground / "out" / "arms").iterdir()]
    assert main(words) == 0
    assert times == [path.stat().st_mtime_ns for path in (ground / "out" / "arms").iterdir()]
    rows = json.loads((ground / "out" / "table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["base", "first-token", "static", "moe-bias"]
    assert rows[1]["parameters"] < rows[3]["parameters"]
    kept = sorted(path.name for path in (ground / "out" / "adapters").iterdir())
    assert kept == ["moe-bias-seed0", "static-seed0"]
    assert main([*words[:-1], "base,stat"]) == 2
    assert "--arms has 'stat', which is none of base, first-token" in capsys.readouterr().err


def test_the_table_has_the_arms_and_seeds_of_earlier_runs_too(ground, capsys):
    words = ["compare", *COMMON.split(), *REWARDED.split(), "--steps", "1", "--warm-problems", "0", "--output", "out"]
    assert main([*words, "--arms", "moe-bias", "--seeds", "3"]) == 0
    assert main([*words, "--arms", "static,moe-bias", "--seeds", "10"]) == 0
    (ground / "out" / "arms" / "moe-bias-seed3.json.part").write_text("")
    capsys.readouterr()
    assert main([*words, "--arms", "base"]) == 0
    rows = json.loads((ground / "out" / "table.json").read_text())["rows"]
    assert [(row["name"], row["seeds"]) for row in rows] == [("base", 1), ("static", 1), ("moe-bias", 2)]
    assert "static" in capsys.readouterr().out


def test_compare_goes_on_from_one_supervised_phase_of_lora(ground, capsys):
    words = ["compare", *COMMON.split(), *REWARDED.split(), "--steps", "2", "--evaluate-every", "1", "--seeds", "0"]
    words += ["--warm-problems", "4", "--warm-epochs", "1", "--lora-warm-epochs", "1", "--lora-batch-size", "4"]
    assert main([*words, "--arms", "lora,lora-sft,moe-bias-sft", "--output", "out"]) == 0
    capsys.readouterr()
    arms = {path.stem: json.loads(path.read_text())["arm"] for path in (ground / "out" / "arms").iterdir()}
    assert sorted(arms) == ["lora-seed0", "lora-sft-seed0", "moe-bias-sft-seed0"]
    assert arms["lora-seed0"]["right"]["held out before"] == arms["lora-sft-seed0"]["right"]["held out before"]
    assert arms["lora-seed0"]["warm_seconds"] == arms["lora-sft-seed0"]["warm_seconds"] > 0
    assert arms["lora-seed0"]["sampled_tokens"] > 0
    assert arms["lora-sft-seed0"]["sampled_tokens"] == arms["moe-bias-sft-seed0"]["sampled_tokens"] == 0
    assert all([step for step, _ in arm["curve"]] == [0, 1, 2] for arm in arms.values())
    assert all(len(arm["tokens"]["held out"]) == len(arm["right"]["held out"]) == 4 for arm in arms.values())
    kept = {path.name: adapter_of_any_method(path)[1] for path in (ground / "out" / "adapters").iterdir()}
    assert kept == {"lora-seed0": "LORA", "lora-sft-seed0": "LORA", "moe-bias-sft-seed0": "MOE_BIAS"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--arms", "moe-bias"], "without worked answers: set --warm-problems 0\n"),
        (
            ["--warm-problems", "0", "--lora-batch-size", "4"],
            "0 and leave out moe-bias-sft and lora-sft with --arms base,first-token,static",
        ),
        (["--arms", "lora", "--lora-batch-size", "7"], "do not divide into micro-batches of 7"),
        (
            ["--arms", "static", "--warm-problems", "0", "--sample-budget", "100"],
            "--sample-budget 100 B does not hold the 13.1 KiB that a step may record; raise it, or lower --prompts",
        ),
    ],
)
def test_compare_refuses_at_once_what_an_arm_could_not_finish(ground, capsys, more, sentence):
    rows = [{"problem": f"w{5 + n} w6", "gold": str(n)} for n in range(20)]
    (ground / "problems.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert main(["compare", *COMMON.split(), *REWARDED.split(), "--output", "out", *more]) == 2
    assert sentence in capsys.readouterr().err
    assert not (ground / "out" / "arms").exists()


def test_compare_refuses_lora_that_no_memory_holds(ground, capsys, monkeypatch):
    monkeypatch.setattr(budget, "machine_bytes", lambda: 10**6)
    words = ["compare", *COMMON.split(), *REWARDED.split(), "--lora-batch-size", "4", "--max-new-tokens", "900"]
    assert main([*words, "--warm-problems", "0", "--arms", "lora", "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert "lora would hold " in error
    assert "there are 976.6 KiB in memory: lower --lora-batch-size, --max-new-tokens" in error
    assert not (ground / "out" / "arms").exists()


def test_compare_refuses_a_supervised_arm_without_a_phase_to_go_on_from(ground, capsys):
    words = ["compare", *COMMON.split(), *REWARDED.split(), "--warm-problems", "0", "--arms", "moe-bias-sft"]
    assert main([*words, "--output", "out"]) == 2
    assert "moe-bias-sft goes on from a supervised phase: leave it out" in capsys.readouterr().err
