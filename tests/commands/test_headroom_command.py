"""`moe-bias headroom` and `moe_bias.headroom`: one record from both, and what is refused."""

import json

import pytest

import moe_bias as mb
from moe_bias.api.data import Data
from moe_bias.cli import main
from moe_bias.report.build import build
from moe_bias.report.record import read_records

ROWS = [{"question": f"w{5 + n % 11} w6", "answer": f"w{9 + n % 3} w{20 + n % 5} w{9 + n % 3}"} for n in range(200)]
WORDS = "headroom --model model --data rows.jsonl --support auto:40 --held-out 0.1 --batch-tokens 64 --device cpu"


@pytest.fixture
def folder(prepared_folder):
    (prepared_folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return prepared_folder


def of_the_run(path):
    """The record without what another call says otherwise."""
    record = json.loads((path / "record.json").read_text())
    for probe in record["probes"]:
        del probe["seconds"]
    return {name: value for name, value in record.items() if name not in ("settings", "provenance")}


def test_command_and_call_leave_the_same_record(folder, capsys):
    assert main([*WORDS.split(), "--output", "out"]) == 0
    printed = capsys.readouterr().out
    base = mb.load("model", device="cpu")
    data = mb.extract(base, "rows.jsonl", held_out=0.1, support="auto:40")
    report = mb.headroom(base, data, mb.SFTConfig(batch_tokens=64), output=folder / "call")
    assert of_the_run(folder / "out") == of_the_run(folder / "call")
    record = json.loads((folder / "out" / "record.json").read_text())
    assert record["kind"] == "headroom"
    assert record["verdict"] == report.title
    assert record["settings"]["top"] == 20
    assert " ".join(report.title.split()) in " ".join(printed.split())
    assert [row["probe"].split(",")[0].removesuffix(" (best)") for row in report.rows()][:5] == [
        *("base", "static", "moe-bias", "network", "choice")
    ]
    assert len(report.rows()) <= 10
    assert "are in the support" in " ".join(str(report).split())
    assert "what needs the backbone" in report._repr_html_()
    assert report.title in report._repr_html_().replace("&#x27;", "'")
    assert list(report.frame().columns) == ["tokens", "held_out_nll"]
    assert len(report.frame()) == 7
    (found,) = read_records([folder / "out"])
    assert found.kind == "headroom"
    blocks = build([found], "").blocks
    assert record["verdict"] in blocks[0].parts[0].text
    assert main([*WORDS.split(), "--output", "out", "--time-limit", "1e-9"]) == 0  # a record of its own is replaced
    assert "Left out, as the time was over: static" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--train-tokens", "500"], "--train-tokens is 500; at least 800 are needed"),
        (["--top", "1"], "--top"),
        (["--output", "model"], "--output 'model' holds the record of another run"),
        (["--store", "nowhere", "--data", ""], "nowhere"),
    ],
)
def test_refusals(folder, capsys, more, sentence):
    (folder / "model" / "record.json").write_text('{"kind": "train sft"}')
    assert main([*WORDS.split(), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_refusals_of_the_call(folder):
    base = mb.load("model", device="cpu")
    other = mb.load("model", device="cpu")
    data = mb.extract(base, ROWS[:40], held_out=0.1, support="auto:40")
    with pytest.raises(mb.UserError, match="there are 200 tokens to train on; at least 800 are needed"):
        mb.headroom(base, data)
    with pytest.raises(mb.UserError, match="`data` is of another frozen model"):
        mb.headroom(other, data)
    with pytest.raises(mb.UserError, match="`top` is 1"):
        mb.headroom(base, data, top=1)
    with pytest.raises(mb.UserError, match="`time_limit` is 0"):
        mb.headroom(base, data, time_limit=0)
    without = Data(base, mb.extract(base, ROWS, held_out=0.1, support="auto:40").store, [], [])
    with pytest.raises(mb.UserError, match="`data` has no held-out examples to measure on"):
        mb.headroom(base, without)
    chosen = [{"prompt": f"w{5 + n} w6", "chosen": "w9 w20", "rejected": "w10"} for n in range(9)]
    with pytest.raises(mb.UserError, match="`data` holds pairs"):
        mb.headroom(base, mb.extract(base, chosen, held_out=0.3, support="auto:40", pairs=True))
