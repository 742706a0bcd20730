"""Choosing among labels from nothing: the same from Python and by the command, resumed to the same record."""

import json
from pathlib import Path

import pytest

import moe_bias as mb
from helpers.saved import save_model
from moe_bias.cli import main

TEMPLATE = "{text} w4 {labels}"
CONFIG = {
    "template": TEMPLATE,
    "chat": False,
    "label_counts": [8],
    "seeds": [0],
    "test_texts": 12,
    "arms": ["zero-shot", "contextual", "divided", "static", "logistic", "moe-bias", "lora"],
    "lora_counts": [8],
    "lora_epochs": 1,
    "lora_rates": [1e-3],
}
OPTIONS = """--no-chat --label-counts 8 --seeds 0 --test-texts 12 --lora-counts 8 --lora-epochs 1 --lora-rates 1e-3
    --arms zero-shot,contextual,divided,static,logistic,moe-bias,lora --device cpu --model model --data rows.jsonl"""


def rows(count: int = 40) -> list[dict[str, str]]:
    return [{"text": f"w{10 + n} w{60 - n}", "label": f"w{7 + n % 2}"} for n in range(count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_BIAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("moe_bias.experiments.label_arms.MOST_STEPS", 10)
    save_model(tmp_path / "model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return tmp_path


def measured(folder: str) -> dict:
    """A record without what depends on the clock and on how it was called."""
    record = json.loads(Path(folder, "record.json").read_text())
    for row in record["rows"]:
        del row["seconds"], row["search_seconds"]
    return {name: record[name] for name in ("kind", "labels", "texts", "shares", "settings", "source", "rows")}


def test_python_and_the_command_leave_the_same_record(folder, capsys):
    base = mb.load("model", device="cpu")
    report = mb.labels(base, "rows.jsonl", mb.LabelsConfig(**CONFIG), output="python")
    assert main(["labels", *OPTIONS.split(), "--template", TEMPLATE, "--output", "command"]) == 0
    printed = capsys.readouterr().out
    assert measured("python") == measured("command")
    assert measured("python")["kind"] == "labels"
    assert [(row.way, row.count) for row in report.ways] == [
        *((name, 0) for name in ("zero-shot", "contextual", "divided")),
        *((name, 8) for name in ("static", "logistic", "moe-bias", "lora")),
    ]
    by_name = {row.way: row for row in report.ways}
    assert by_name["zero-shot"].change is None
    assert by_name["moe-bias"].lead is None
    assert set(by_name["lora"].lead) == {"accuracy", "nll", "ece"}
    assert all(name in printed for name in by_name)

    assert main(["report", "python", "--output", "report"]) == 0
    assert "MoE-Bias with 8 labels: " in Path("report/report.md").read_text()

    layer = mb.load_layer("python/adapters/8", base)
    assert layer.config.experts == "linear"
    assert (
        Path("command/adapters/8/adapter_model.safetensors").read_bytes()
        == Path("python/adapters/8/adapter_model.safetensors").read_bytes()
    )


def test_what_was_done_before_an_interrupt_is_not_done_again(folder, monkeypatch):
    base, config = mb.load("model", device="cpu"), mb.LabelsConfig(**CONFIG)
    mb.labels(base, rows(), config, output="whole")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr("moe_bias.api.labels.logistic", interrupted)
        with pytest.raises(KeyboardInterrupt, match="4 of 7 are done and kept"):
            mb.labels(base, rows(), config, output="cut")
    assert not Path("cut/record.json").exists()

    def again(*_):
        raise AssertionError("it was done already")

    monkeypatch.setattr("moe_bias.api.labels.zero_shot_arms", again)
    mb.labels(base, rows(), config, output="cut")
    assert measured("cut") == measured("whole")


def test_other_texts_or_settings_do_not_go_on_in_a_folder(folder):
    base = mb.load("model", device="cpu")
    config = mb.LabelsConfig(**{**CONFIG, "arms": ["zero-shot"]})
    mb.labels(base, rows(), config, output="out")
    with pytest.raises(mb.UserError, match="`test_texts` 12, not 11"):
        mb.labels(base, rows(), config.model_copy(update={"test_texts": 11}), output="out")
    other = [{**row, "text": row["text"] + " w5"} for row in rows()]
    with pytest.raises(mb.UserError, match="other"):
        mb.labels(base, other, config, output="out")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"test_texts": 38}, "has 40 usable texts; 38 to measure on .* and 8 to learn from .* are 46"),
        ({"label_counts": [3]}, "`label_counts` has 3, and the rows has 2 labels; give at least 4, 2 of each"),
        ({"template": "{labels}"}, "template is '{labels}': it has no {text} in it"),
        ({"seeds": [1, 1]}, "seeds is .*1 stands there twice"),
    ],
)
def test_what_cannot_be_compared_is_told_before_the_model_runs(folder, changes, sentence, monkeypatch):
    monkeypatch.setattr("moe_bias.api.labels.stored", None)
    base = mb.load("model", device="cpu")
    with pytest.raises(mb.UserError, match=sentence):
        mb.labels(base, rows(), mb.LabelsConfig(**{**CONFIG, **changes}))


def test_a_rare_label_is_named(folder):
    few = [*rows(), {"text": "w95 w3", "label": "w50"}]
    config = mb.LabelsConfig(**{**CONFIG, "label_counts": [20]})
    with pytest.raises(mb.UserError, match="texts of the label 'w50' to learn from, and at least 2 are needed"):
        mb.labels(mb.load("model", device="cpu"), few, config)
