"""`--dry-run`: what is said of a run, and that nothing of it is begun."""

import json
import shutil

import pytest

from helpers.complaints import complaint
from helpers.saved import save_model
from moe_bias.cli import main, settings_of
from moe_bias.experiments.arm import ArmRecords
from moe_bias.experiments.policy_arms import PolicyArm
from moe_bias.records import RecordKind
from moe_bias.training import budget

RL = (
    "train rl --model model --problems problems.jsonl --gold-column gold --train-problems 12 --test-problems 4 "
    "--support auto:40 --device cpu --prompts 3 --group 4 --max-new-tokens 5 --output new --dry-run"
)
SFT = "train sft --model model --data rows.jsonl --support auto:40 --device cpu --output new --dry-run"
EXTRACT = "extract --model model --data rows.jsonl --support auto:40 --device cpu --output new --dry-run"
DRAFT = SFT.replace("train sft", "train draft") + " --target target"

COMPARE = (
    "compare --model model --problems worked.jsonl --gold-column gold --train-problems 12 --test-problems 4 "
    "--support auto:40 --device cpu --prompts 3 --group 4 --max-new-tokens 5 --lora-batch-size 4 --steps 20 "
    "--warm-problems 6 --seeds 0,1 --output new --dry-run"
)


@pytest.fixture
def folder(prepared_folder):
    rows = [{"problem": f"w{5 + n} w6", "gold": str(n)} for n in range(20)]
    (prepared_folder / "problems.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    worked = [row | {"solution": f"w9 \\boxed{{{row['gold']}}}"} for row in rows]
    (prepared_folder / "worked.jsonl").write_text("\n".join(json.dumps(row) for row in worked))
    return prepared_folder


@pytest.fixture
def said(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no cell is broken into lines

    def said(*words: str) -> str:
        before = sorted(path.name for path in folder.iterdir())
        assert main([*words]) == 0
        assert sorted(path.name for path in folder.iterdir()) == before
        return " ".join(capsys.readouterr().out.split())

    return said


def test_reinforcement_learning_is_worked_out_and_not_begun(said):
    text = said(*RL.split())
    assert "trainable" in text
    assert "A step samples up to 60 tokens, 3 problems x 4 answers x 5, and learns from 12 of them; 40 steps." in text
    assert "key-value cache of 12 answers" in text
    assert "tokens a second were sampled, in 12 rows" in text


def test_supervised_training_is_worked_out_and_not_begun(said):
    text = said(*SFT.split())
    assert "feature store" in text
    assert "tokens go through the model once, prompts counted" in text
    assert "the one pass through the model takes" in text


def test_extraction_is_worked_out_and_not_begun(said):
    whole, half = (said(*EXTRACT.split(), *more) for more in ((), ("--shard", "1/2")))
    assert "completion tokens" in whole
    assert int(whole.split(" completion tokens")[0].split()[-1]) > int(half.split(" completion tokens")[0].split()[-1])
    assert "tokens a second went through the model: all take" in whole


def test_training_on_a_store_extracts_nothing(said, folder):
    assert main([*EXTRACT.split()[:-1]]) == 0
    text = said(*[word for word in SFT.split() if word not in ("--data", "rows.jsonl")], "--store", "new")
    assert "feature store" not in text
    assert "it is not tried here" in text


def test_a_draft_is_worked_out_and_not_begun(said, folder):
    save_model(folder / "target", hidden_size=24)
    text = said(*DRAFT.split())
    for held in ("weights", "feature store", "base logits"):
        assert f"{held} of the draft" in text
        assert f"{held} of the target" in text
    assert "target: " in text
    assert "tokens go through each model once, prompts counted" in text
    for name in ("draft", "target"):
        assert f"tokens a second went through the {name}: its one pass takes " in text
    assert "went through both output embeddings" in text
    assert "base logits of the target" not in said(*DRAFT.split(), "--logits-budget", "5KB")


@pytest.mark.parametrize("whose", ["target", "draft"])
def test_a_draft_on_own_samples_is_worked_out_and_none_is_sampled(said, folder, whose):
    save_model(folder / "target", hidden_size=24)
    text = said(*DRAFT.split(), "--own-samples", whose, "--max-new-tokens", "7", "--held-out", "0.2")
    rows = len((folder / "rows.jsonl").read_text().splitlines())
    assert f"About {round(0.8 * rows) * 7:,} tokens to train on" in text
    assert "Up to " in text
    assert "tokens a second were sampled, in " in text


def test_a_draft_on_a_store_runs_the_target_alone(said, folder):
    save_model(folder / "target", hidden_size=24)
    assert main(EXTRACT.split()[:-1]) == 0
    words = [word for word in DRAFT.split() if word not in ("--support", "auto:40")]
    text = said(*words, "--store", "new")
    assert "tokens go through the target once" in text
    assert "feature store of the draft" not in text
    assert "went through the draft" not in text


def test_a_draft_that_would_be_refused_is_refused(folder, capsys):
    save_model(folder / "other", word="v")
    save_model(folder / "short", max_position_embeddings=4)
    words = DRAFT.split()[:-1]
    assert "token id 0 is 'w0' of the draft and 'v0' of the target" in complaint(capsys, *words, "other")
    assert "and the target reads 4; extract with --max-length 4" in complaint(capsys, *words, "short")
    (folder / "other" / "model.safetensors").unlink()
    shutil.copytree(folder / "model", folder / "bare")
    (folder / "bare" / "model.safetensors").unlink()
    assert main([*words, "bare"]) == 0
    assert "no hours are expected: model 'bare' cannot be loaded" in " ".join(capsys.readouterr().out.split())


def test_a_comparison_is_worked_out_and_not_begun(said):
    text = said(*COMPARE.split())
    assert "samples up to 60 tokens, 3 problems x 4 answers x 5; 20 steps." in text
    assert "key-value cache of 12 answers" in text
    assert "logits of a micro-batch" in text
    assert "tokens a second went forward and back through the model under LoRA" in text
    assert "Estimates: " in text
    assert " base 1 of 1 0 20 0 " in text
    assert " moe-bias 2 of 2 " in text
    assert " lora 2 of 2 " in text
    assert " lora's start " in text
    assert " sum 19 3,360 17,820 " in text  # 5 arms with a layer and 2 of LoRA by rewards, 2 seeds, 20 x 12 samples


def test_arms_with_a_record_cost_nothing(said, folder):
    records = ArmRecords(folder / "new", RecordKind.ARMS, PolicyArm)
    for name, seed in (("base", 0), ("moe-bias", 0), ("moe-bias", 1), ("lora", 1)):
        records.save(PolicyArm(name, seed, 1, 1, 1.0, 1.0, 1.0, 1, {}, []), {})
    text = said(*COMPARE.split(), "--arms", "base,static,moe-bias,lora")
    assert "base and moe-bias cost nothing: their records are in new" in text
    assert " moe-bias 0 of 2 " in text
    assert " lora 1 of 2 " in text
    assert " sum 3 " in text
    text = said(*COMPARE.split(), "--arms", "base,moe-bias")
    assert "All arms have their records in new: nothing would be run." in text
    assert "tokens a second" not in text


def test_a_comparison_that_would_be_refused_says_so(said, folder, capsys, monkeypatch):
    text = said(*COMPARE.split(), "--arms", "static", "--sample-budget", "100")
    assert "The run would be refused: `sample_budget` 100 B does not hold the " in text
    monkeypatch.setattr(budget, "machine_bytes", lambda: 1000)
    text = said(*COMPARE.split(), "--arms", "static,lora")
    assert "static would hold" in text
    assert "The run would be refused: lora would hold " in text
    assert "lower `lora_batch_size`, `max_new_tokens`" in text
    for more, sentence in (
        (["--lora-batch-size", "7"], "do not divide into micro-batches of 7"),
        (["--arms", "stat"], "--arms has 'stat', which is none of base"),
        (["--problems", "problems.jsonl"], "has problems without worked answers"),
    ):
        assert sentence in complaint(capsys, *COMPARE.split(), *more)


def test_model_without_weights_is_worked_out_from_its_config(said, folder, capsys):
    (folder / "model" / "model.safetensors").unlink()
    for words in (RL, SFT, EXTRACT, COMPARE):
        text = said(*words.split())
        assert "weights" in text
        assert "The model is not tried, so that no hours are expected: model 'model' cannot be loaded" in text
    shutil.rmtree(folder / "model")
    assert "model 'model' cannot be loaded" in complaint(capsys, *RL.split())


def test_what_does_not_fit_is_said(said, monkeypatch):
    monkeypatch.setattr(budget, "machine_bytes", lambda: 1000)
    text = said(*RL.split(), "--sample-budget", "100")
    assert "of 1000 B in memory, which does not fit." in text
    assert "no hours are expected: its weights take" in text
    assert "The first step would be refused: `sample_budget` 100 B does not hold" in text


@pytest.mark.parametrize("command", [RL, DRAFT, COMPARE])
def test_run_that_was_worked_out_is_the_same_run(command):
    words = [word for word in command.split() if word != "--dry-run"]
    assert settings_of(command.split())[1].model_dump() == settings_of(words)[1].model_dump()
    assert settings_of(command.split())[1].dry_run


def test_mistakes_of_the_run_are_told(folder, capsys):
    assert "--support 'auto:4000' is none of" in complaint(capsys, *RL.split(), "--support", "auto:4000")
    assert "rows.jsonl" in complaint(capsys, *SFT.split(), "--data", "missing-rows.jsonl")
