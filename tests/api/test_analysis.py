"""`mb.analyze` finds what `moe-bias analyze` does, and its flips are a table."""

import json
from pathlib import Path

import pytest

import moe_bias as mb
from helpers.saved import save_adapter
from moe_bias.cli import main

SIZES = {"flips": 3, "contexts": 2, "continuation": 4}
OPTIONS = " ".join(f"--{name} {size}" for name, size in SIZES.items())
PARITY = """
import moe_bias as mb


class Parity:
    name = "parity"

    def problems(self, count, seed):
        return [mb.Problem(f"w{n % 40} w{n // 40}", "an even sum") for n in range(count)]

    def verify(self, problems, completions):
        even = [sum(map(ord, text)) % 2 == 0 for text in completions]
        return [mb.Verdict("correct" if one else "wrong", None, float(one)) for one in even]
"""


@pytest.fixture
def base(prepared_folder) -> mb.Frozen:
    save_adapter(prepared_folder / "adapter", "model")
    Path("parity.py").write_text(PARITY)
    return mb.load("model", device="cpu")


@pytest.fixture
def layer(base) -> mb.MoEBiasLayer:
    return mb.load_layer("adapter", base)


def of_the_command(options: str):
    command = f"analyze --model model --device cpu --adapter adapter --output out {OPTIONS} {options}"
    assert main(command.split()) == 0
    return json.loads(Path("out/analysis.json").read_text())["adapters"][0]


def as_json(record):
    return json.loads(json.dumps({**record, "name": "adapter"}))


def test_a_text_is_read_as_the_command_reads_it(base, layer):
    data = mb.extract(base, "rows.jsonl", held_out=0.3, seed=4, support=layer.support.tolist())
    found = mb.analyze(base, layer, data, **SIZES)
    theirs = of_the_command("--data rows.jsonl --held-out 0.3 --seed 4")
    ours = as_json(found.record)
    for key, value in ours.pop("strata")["all"]["means"].items():
        assert value == pytest.approx(theirs["strata"]["all"]["means"][key], rel=1e-3, abs=1e-5)
    assert [flip["base_continuation"] for flip in ours["flips"]] == [
        flip["base_continuation"] for flip in theirs["flips"]
    ]
    assert [flip["kl"] for flip in ours["flips"]] == pytest.approx([flip["kl"] for flip in theirs["flips"]], rel=1e-3)
    assert found.flips.moments == found.record["flips"]
    assert str(found.flips).startswith("Places where the choice of token changes, the 3 of largest KL")
    assert [row["KL, nats"] for row in found.flips.frame().to_dict("records")] == [
        flip["kl"] for flip in found.record["flips"]
    ]


def test_answers_to_a_task_are_read_as_the_command_reads_them(base, layer):
    """To the same numbers: the model, the problems and the layer are the same."""
    counts = {"train_problems": 2, "test_problems": 12, "max_new_tokens": 5}
    options = " ".join(f"--{name.replace('_', '-')} {count}" for name, count in counts.items())
    theirs = of_the_command(f"--task parity:Parity {options}")
    found = mb.analyze(base, layer, task="parity:Parity", **counts, **SIZES)
    assert as_json(found.record) == theirs
    turns, turned = theirs["answers"]["turns"], found.flips
    assert min(turns["mended"], turns["spoiled"]) > 0, "else nothing is seen here"
    assert f"{turns['mended']} answers mended and {turns['spoiled']} spoiled" in str(turned)
    assert len(turned.rows()) == turns["mended"] + turns["spoiled"]
    assert {row["outcome"] for row in turned.rows()} == {"wrong → correct", "correct → wrong"}
    assert "of the problems are solved without it" in str(found).replace("\n", " ")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({}, "`data` is None; give what moe_bias.extract"),
        ({"task": "products", "rho": 1}, "`rho` is 1; give the share of high entropy, above 0 and below 1"),
        ({"task": "products", "continuation": 0}, "`continuation` is 0; give at least 1"),
        ({"task": "products", "test_problems": 0}, "`test_problems` is 0; give at least 1"),
    ],
)
def test_mistakes(base, layer, wrong, sentence):
    with pytest.raises(mb.UserError, match=sentence):
        mb.analyze(base, layer, **wrong)
