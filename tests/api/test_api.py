"""The library in Python: calls do what the commands do, to the same bytes, and say what is wrong in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_bias as mb
from helpers.models import tiny_model
from helpers.saved import save_model
from helpers.training_processes import ADAPTER
from moe_bias.cli import main
from moe_bias.evaluation.samples import SampleFile

ROWS = [{"prompt": f"w{a} w{b}", "completion": f"w{(a + b) % 50} w{a}"} for a in range(3, 11) for b in range(4, 9)]
CONFIG = {"epochs": 2, "batch_tokens": 16, "num_experts": 2, "expert_rank": 2}
OPTIONS = "--epochs 2 --batch-tokens 16 --num-experts 2 --expert-rank 2"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_BIAS_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.fixture
def base(folder) -> mb.Frozen:
    return mb.load("model", device="cpu")


def data_of(base: mb.Frozen, rows=None, **changes) -> mb.Data:
    return mb.extract(base, ROWS if rows is None else rows, **{"support": "auto:40", "held_out": 0.2, **changes})


def adapter(folder: str) -> bytes:
    return Path(folder, ADAPTER).read_bytes()


class Sums:
    """A task with the protocol and nothing else."""

    name = "sums"

    def problems(self, count: int, seed: int) -> list[mb.Problem]:
        return [mb.Problem(f"w{n % 40} w{n // 40}", f"w{n % 40}", f"w{n % 40}", {}) for n in range(count)]

    def verify(self, problems, completions) -> list[mb.Verdict]:
        right = [len(text) % 2 == 0 for text in completions]
        return [mb.Verdict("correct" if one else "wrong", None, float(one)) for one in right]


def test_every_public_name_is_there_and_described():
    for name in mb.__all__:
        assert (getattr(mb, name).__doc__ or "").strip(), name
    code = "import sys, moe_bias; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_supervised_training_is_that_of_the_command(base):
    command = f"train sft --model model --device cpu --data rows.jsonl --support auto:40 --held-out 0.2 {OPTIONS}"
    assert main([*command.split(), "--output", "of-the-command"]) == 0
    layer, report = mb.train_sft(base, data_of(base, "rows.jsonl"), mb.SFTConfig(**CONFIG), output="of-python")
    assert adapter("of-python") == adapter("of-the-command")
    records = [json.loads(Path(name, "record.json").read_text()) for name in ("of-python", "of-the-command")]
    for key in ("base_nll", "adapted_nll", "change", "training"):
        assert records[0][key] == records[1][key]
    assert report.change.value == records[0]["change"]["value"]
    # Rows in memory, and features that are kept nowhere, give the same layer.
    again, _ = mb.train_sft(base, data_of(base, keep=False), mb.SFTConfig(**CONFIG))
    for one, other in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_by_rewards_is_that_of_the_command(base, folder):
    shape = "--support all --num-experts 2 --expert-rank 2 --steps 2 --prompts 3 --group 4 --max-new-tokens 4"
    counts = "--train-problems 12 --test-problems 4 --kl-bound 1 --equal-steps 9"
    Path("summing.py").write_text(
        "import moe_bias as mb\n\n\nclass Sums:\n    name = 'sums'\n\n"
        "    def problems(self, count, seed):\n"
        "        return [mb.Problem(f'w{n % 40} w{n // 40}', f'w{n % 40}', f'w{n % 40}', {}) for n in range(count)]\n\n"
        "    def verify(self, problems, completions):\n"
        "        right = [len(text) % 2 == 0 for text in completions]\n"
        "        return [mb.Verdict('correct' if one else 'wrong', None, float(one)) for one in right]\n"
    )
    command = f"train rl --model model --device cpu --task summing:Sums {shape} {counts} --evaluate-every 2"
    assert main([*command.split(), "--output", "of-the-command"]) == 0
    config = mb.RLConfig(
        support="all",
        num_experts=2,
        expert_rank=2,
        steps=2,
        prompts=3,
        group=4,
        max_new_tokens=4,
        kl_bound=1,
        equal_steps=9,
    )
    layer, report = mb.train_rl(
        base, Sums(), None, config, train_problems=12, test_problems=4, watch=mb.Watch(2), output="of-python"
    )
    assert adapter("of-python") == adapter("of-the-command")
    assert any(parameter.abs().sum() > 0 for parameter in layer.parameters())
    assert report.steps == 2
    assert [step["step"] for step in report.curve] == [0, 1, 2]


def test_evaluation_is_that_of_the_command(base):
    layer, _ = mb.train_sft(base, data_of(base), mb.SFTConfig(**CONFIG))
    mb.save(layer, "mine", base)
    command = "eval --model model --device cpu --data rows.jsonl --question-column prompt --gold-column completion"
    sampling = "--samples 2 --temperature 1 --max-new-tokens 6 --limit 6"
    assert main([*command.split(), *sampling.split(), "--adapter", "mine", "--output", "out"]) == 0
    config = mb.EvalConfig(
        data="rows.jsonl",
        question_column="prompt",
        gold_column="completion",
        samples=2,
        temperature=1,
        max_new_tokens=6,
        limit=6,
    )
    found = mb.evaluate(base, {"base": None, "mine": "mine"}, config=config)
    assert found.samples == list(SampleFile(Path("out"), 2).read())
    arms = json.loads(Path("out/record.json").read_text())["arms"]
    assert [found[name].accuracy.value for name in ("base", "mine")] == [arm["accuracy"]["value"] for arm in arms]


def test_a_layer_is_trained_on_from_where_it_is_and_stays_as_it_was(base):
    data = data_of(base)
    layer, first = mb.train_sft(base, data, mb.SFTConfig(**CONFIG))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    _, second = mb.train_sft(base, data, mb.SFTConfig(**CONFIG), layer=layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert second.adapted_nll.value < first.adapted_nll.value


def test_features_are_found_again_and_those_that_are_not_kept_go(base, folder, capsys):
    data_of(base)
    capsys.readouterr()
    data_of(base)
    assert "the model is not run for them" in capsys.readouterr().out.replace("\n", " ")
    data = data_of(base, keep=False)
    place = data.store.folders[0]
    assert place.is_dir()
    assert len(data.prepared.held_out) == 24
    del data
    assert not place.exists()
    assert data_of(base, keep="here").store.folders == (Path("here"),)
    found = repr(mb.extract(base, "here", held_out=0.2))
    assert found == "Data(120 tokens of 40 examples, 8 of them held out, support 40)"


def test_a_training_without_a_folder_leaves_nothing(base, folder, monkeypatch):
    import tempfile

    Path("temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    mb.train_sft(base, data_of(base, keep=False), mb.SFTConfig(**CONFIG))
    assert list(Path("temporary").iterdir()) == []


def test_reports_are_tables_curves_and_frames(base):
    data = data_of(base)
    layer, report = mb.train_sft(base, data, mb.SFTConfig(**CONFIG))
    assert str(report).startswith("Held-out NLL")
    assert "change" in str(report)
    assert max(map(len, str(report).splitlines())) <= 100
    page = report._repr_html_()
    assert page.count("<tr>") == 4
    assert "<svg" in page
    assert list(report.frame()["step"]) == [step["step"] for step in report.curve]
    found = mb.evaluate(base, {"base": None, "mine": layer}, Sums(), mb.EvalConfig(limit=4, max_new_tokens=4))
    assert "4 problems of sums" in str(found)
    assert list(found.frame()["policy"]) == ["base", "mine"]
    analysis = mb.analyze(base, layer, data)
    assert [row["tokens of entropy"] for row in analysis.rows()] == ["all", "high", "low"]
    assert len(analysis.experts) == 2


def test_what_python_saves_is_what_python_loads(base):
    layer, _ = mb.train_sft(base, data_of(base), mb.SFTConfig(**CONFIG))
    mb.save(layer, "mine", base)
    again = mb.load_layer("mine", base)
    assert all(torch.equal(one, other) for one, other in zip(layer.parameters(), again.parameters(), strict=True))
    assert mb.generate(base, "w5 w6", again, max_new_tokens=4) == mb.generate(base, "w5 w6", layer, max_new_tokens=4)


def fail(prompt, completion, gold):
    raise RuntimeError("nothing to see")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda base: data_of(base, held_out=2), "held_out is 2: give the share to measure on, above 0 and below 1"),
        (lambda base: data_of(base, rows=[]), "the rows are none; give at least one"),
        (lambda base: data_of(base, rows=[{"a": 1}]), "row 1 of the rows has columns ['a']"),
        (lambda base: data_of(base, rows="nowhere.jsonl"), "nowhere.jsonl is not a file"),
        (lambda base: data_of(base, support="many"), "`support` 'many' is none of 'auto:M' with M from 1 to"),
        (lambda base: mb.SFTConfig(epoch=3), "SFTConfig has no 'epoch'; the nearest is 'epochs'"),
        (
            lambda base: mb.train_sft(mb.Frozen(tiny_model(), base.tokenizer), data_of(base)),
            "`data` is of another frozen model than `base`; extract it with this one",
        ),
        (lambda base: mb.evaluate(base, {"base": None}), "give a `task`, or a config with a `benchmark`, `data` or a"),
        (lambda base: mb.evaluate(base, {}, Sums()), "`policies` is empty; give a layer by name"),
        (lambda base: mb.evaluate(base, {"x": "nowhere"}, Sums()), "'nowhere' is neither a folder nor an adapter"),
        (lambda base: mb.train_rl(base, Sums(), reward=fail), "fail failed on a first sample with RuntimeError"),
        (lambda base: mb.train_rl(base, Sums(), reward=fail, objective="dpp"), "there is no objective 'dpp'"),
        (lambda base: mb.load_layer("nowhere", base), "'nowhere' is neither a folder nor an adapter"),
        (lambda base: mb.load("nowhere-at-all/model"), "model 'nowhere-at-all/model'"),
        (lambda base: mb.task("productz").problems(2, 0), "productz"),
    ],
)
def test_mistakes_in_python_are_one_sentence_that_names_the_argument(base, call, sentence):
    with pytest.raises(mb.UserError) as caught:
        call(base)
    assert sentence in str(caught.value)
    assert "--" not in str(caught.value)
