"""`moe-bias train draft` on tiny models: from rows to an adapter, own samples, an interrupt, and what is refused."""

import json

import pytest
import torch

from helpers.models import VOCABULARY
from helpers.saved import save_model
from helpers.training_processes import adapter
from moe_bias.cli import main
from moe_bias.training.loop import Loop

COMMON = (
    "train draft --model model --target target --data rows.jsonl --held-out 0.3 --support auto:40 --batch-tokens 16 "
    "--experts free --expert-rate 0.1 --device cpu"
)


@pytest.fixture
def folder(prepared_folder):
    save_model(prepared_folder / "target", hidden_size=24)
    return prepared_folder


def words(output, *more):
    epochs = [] if "--epochs" in more else ["--epochs", "8"]
    return [*COMMON.split(), *epochs, "--output", str(output), *more]


def record_of(output):
    return json.loads((output / "record.json").read_text())


def test_rows_become_an_adapter_that_is_nearer_to_the_target(folder, capsys):
    output = folder / "out"
    assert main(words(output, "--target-features", str(folder / "kept"))) == 0
    said = capsys.readouterr().out
    assert "of the target's probability" in said
    assert "held-out plain" in said
    record = record_of(output)
    assert record["settings"]["target"] == "target"
    plain, adapted = record["rows"]
    assert adapted["kl"]["value"] < plain["kl"]["value"]
    assert (folder / "kept" / "manifest.json").is_file()
    assert adapter(output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_loss"] == pytest.approx(adapted["kl"]["value"], rel=1e-4)
    assert {"forward_kl", "reverse_kl"} <= lines[1].keys()
    assert main(["report", str(output), "--output", str(folder / "report")]) == 0
    report = (folder / "report" / "report.md").read_text()
    assert "The target target accepts" in report
    assert "tokens a pass" in report


@pytest.mark.parametrize("whose", ["target", "draft"])
def test_own_samples_are_kept_and_trained_on(folder, capsys, whose):
    output, sampled = folder / "out", ["--own-samples", whose, "--max-new-tokens", "5"]
    assert main(words(output, *sampled)) == 0
    assert f"30 answers of the {whose}" in capsys.readouterr().out
    assert len((output / "own-answers.jsonl").read_text().splitlines()) == 31
    assert record_of(output)["settings"]["own_samples"] == whose
    if whose == "draft":
        again = folder / "again"
        assert main(words(again, *sampled, "--adapter", str(output))) == 0
        one, two = ((path / "own-answers.jsonl").read_text() for path in (output, again))
        assert one != two  # the second are under the adapter


def test_features_of_a_store_are_used_with_its_texts(folder, capsys):
    extract = "extract --model model --data rows.jsonl --support auto:40 --output store --device cpu"
    assert main(extract.split()) == 0
    stored = words(folder / "out", "--store", "store")
    stored.remove("auto:40")
    stored.remove("--support")
    assert main(stored) == 0
    assert (
        main([word for word in words(folder / "other", "--store", "store") if word not in ("--data", "rows.jsonl")])
        == 2
    )
    assert "--data is required: the target reads the texts" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, capsys, monkeypatch):
    whole, cut = folder / "whole", folder / "cut"
    assert main(words(whole, "--checkpoint-every", "5")) == 0
    watched = Loop._watched

    def interrupted(self, metrics):
        if self._position.step == 12:
            raise KeyboardInterrupt
        return watched(self, metrics)

    monkeypatch.setattr(Loop, "_watched", interrupted)
    assert main(words(cut, "--checkpoint-every", "5")) == 130
    assert "goes on from" in capsys.readouterr().err
    monkeypatch.setattr(Loop, "_watched", watched)
    assert main(words(cut, "--checkpoint-every", "5", "--reverse", "0.5")) == 2
    assert "holds an unfinished run with --reverse 0.0, not 0.5" in capsys.readouterr().err
    assert main(words(cut, "--checkpoint-every", "5")) == 0
    one, two = adapter(whole), adapter(cut)
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--target", "nowhere"], "model 'nowhere' cannot be loaded"),
        (["--target", "other"], "token id 0 is 'w0' of the draft and 'v0' of the target"),
        (["--target", "short"], "and the target reads 4; extract with --max-length 4"),
        (["--max-new-tokens", "5"], "--max-new-tokens 5 needs --own-samples; give both"),
        (["--features", "one", "--target-features", "one"], "are both one; give two folders"),
        (["--own-samples", "draft", "--store", "s"], "--own-samples draft and --store s exclude each other"),
        (["--reverse", "2"], "--reverse"),
        (["--kl-weight", "1"], "it would hold the draft where it is"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(folder, capsys, more, sentence):
    save_model(folder / "other", word="v")
    save_model(folder / "short", max_position_embeddings=4, vocab_size=VOCABULARY + 3)
    assert main(words(folder / "out", *more)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert not (folder / "out" / "adapter_config.json").exists()
