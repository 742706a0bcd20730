"""Sweeps and arms: the grid, the comparison by hand, records that are used again, and LoRA beside it."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from helpers.calls import counted
from helpers.cells import cell_of
from helpers.models import VOCABULARY, tiny_model
from helpers.training import features_of, head_of
from moe_bias.backbone import find_head
from moe_bias.cli import main
from moe_bias.commands import arms as arms_command
from moe_bias.commands.training_settings import SweepSettings
from moe_bias.config import OWN_SUPPORT
from moe_bias.evaluation.likelihood import token_nll
from moe_bias.evaluation.strata import by_stratum, counts_by_stratum
from moe_bias.experiments import cells as cells_module
from moe_bias.experiments import supervised
from moe_bias.experiments.arm import ArmRecords
from moe_bias.experiments.cells import Cell, compare_cells
from moe_bias.experiments.grid import cell_name, find_cell, parse_grid, with_changes
from moe_bias.experiments.lora import Budget, LoRAChoices, completion_log_prob, lora_on, lora_token_nll, train_lora
from moe_bias.experiments.policy_arms import PolicyArm
from moe_bias.features import making
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.mistakes import UserError
from moe_bias.records import RecordKind
from moe_bias.tasks.conversations import Example

EXAMPLES = [Example([5, 6, 7], [8, 9, 2]), Example([5], [11, 2]), Example([20, 21, 22, 23, 24], [3])]


@pytest.fixture
def folder(prepared_folder):
    return prepared_folder


def test_grid():
    cells = parse_grid("num_experts=4,16 expert-rate=2e-2,5e-2")
    assert [cell_name(cell) for cell in cells] == [
        "num_experts=4 expert_rate=2e-2",
        "num_experts=4 expert_rate=5e-2",
        "num_experts=16 expert_rate=2e-2",
        "num_experts=16 expert_rate=5e-2",
    ]
    assert find_cell("", cells) == "num_experts=4 expert_rate=2e-2"
    assert find_cell("expert_rate=5e-2 num_experts=16", cells) == "num_experts=16 expert_rate=5e-2"


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ("", "`grid` is empty"),
        ("num_experts", "`grid` has 'num_experts'; write it as name=value,value"),
        ("num_experts=4,", "`grid` has 'num_experts=4,'; write it as"),
        ("num_experts=4 num_experts=8", "`grid` has num_experts twice"),
        ("num_experts=4,4", "in which a value stands twice"),
        ("seed=1,2", "every cell is run with each of `seeds`"),
        ("output=a,b", "`grid` has 'output', which is none of batch_tokens,"),
    ],
)
def test_bad_grids_are_refused(grid, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_grid(grid)


@pytest.mark.parametrize(("base", "number"), [("num_experts=5", "no"), ("num_experts=4", "2"), ("nonsense", "no")])
def test_a_base_that_names_no_single_cell_is_refused(base, number):
    with pytest.raises(UserError, match=f"`base` '{base}' names {number} cells of the grid"):
        find_cell(base, parse_grid("num_experts=4,8 epochs=1,2"))


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ({"num_experts": "many"}, "with num_experts = many: num_experts is 'many': input should be a valid integer"),
        ({"num_experts": "1"}, "with num_experts = 1: top_k = 2 is more than num_experts = 1"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, cell, sentence):
    settings = SweepSettings(data="none", output=tmp_path, grid="x")
    with pytest.raises(UserError, match=sentence):
        with_changes(settings, cell)


def test_a_change_of_settings_keeps_what_was_given_and_what_was_not():
    settings = SweepSettings(store="s", output="o", grid="g", epochs=3)
    changed = with_changes(settings, {"num_experts": "4"})
    assert (changed.epochs, changed.num_experts, changed.support) == (3, 4, OWN_SUPPORT)
    assert with_changes(settings, {"support": "all"}).support == "all"


def test_comparison_by_hand():
    # Two examples of two tokens. a: seeds 4 + 4 and 8 + 4 nats, mean 6 and 4: 10 / 4 = 2.5; seeds 2 and 3, spread 1.
    # b: 5 and 3: 8 / 4 = 2; change (5 - 6 + 3 - 4) / 4 = -0.5, -0.5 per token for each example: no spread.
    # high: tokens in both examples, half of the nats and one token each: (2.5 + 1.5) / 2 = 2, against (3 + 2) / 2.
    # low: tokens in one example only, which has no interval.
    rows = compare_cells([cell_of("a", 0, [4.0, 4.0]), cell_of("a", 1, [8.0, 4.0]), cell_of("b", 0, [5.0, 3.0])], "a")
    a, b = rows
    assert (a.name, a.seeds, a.spread, a.change, a.seconds) == ("a", 2, 1.0, None, 2.0)
    assert a.nll["all"].value == 2.5
    assert (b.nll["all"].value, b.change["all"].value) == (2.0, -0.5)
    assert (b.change["all"].low, b.change["all"].high) == (-0.5, -0.5)
    assert (b.nll["high"].value, b.change["high"].value) == (2.0, -0.5)
    assert set(b.nll) == set(b.change) == {"all", "high"}


def test_cells_on_other_tokens_are_not_compared():
    with pytest.raises(UserError, match="'b' and 'a' are of different held-out tokens"):
        compare_cells([cell_of("a", 0, [1.0, 1.0]), cell_of("b", 0, [1.0, 1.0], tokens=(2.0, 3.0))], "a")


def test_strata_are_the_top_fifth_and_the_rest():
    features = features_of(head_of(), tokens=50)
    high, counts = features.entropy.topk(10).indices, counts_by_stratum(features)
    assert counts["all"].tolist() == [7.0] * 7 + [1.0]
    assert counts["high"].sum() == 10
    assert (counts["high"] + counts["low"] == counts["all"]).all()
    assert by_stratum(features.entropy, features)["high"].sum() == pytest.approx(float(features.entropy[high].sum()))


def test_records_are_found_again_and_damaged_ones_named(tmp_path):
    records = ArmRecords(tmp_path, RecordKind.CELLS, Cell)
    cell = cell_of("support=a/b.json k=1", 3, [4.0, 4.0])
    assert records.load(cell.name, 3) is None
    records.save(cell, {"epochs": 1})
    assert records.load(cell.name, 3) == cell
    assert records.load(cell.name, 4) is None
    path = next(records.folder.iterdir())
    assert json.loads(path.read_text())["settings"] == {"epochs": 1}
    path.write_text("{")
    with pytest.raises(UserError, match=r"is damaged: .*; remove it to run the arm again"):
        records.load(cell.name, 3)


def test_cells_of_before_are_found_and_arms_of_another_comparison_refused(tmp_path):
    records, cell = ArmRecords(tmp_path, RecordKind.CELLS, Cell), cell_of("k=1", 0, [4.0, 4.0])
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "k=1-seed0.json").write_text(json.dumps({"cell": asdict(cell), "settings": {}}))
    assert records.load("k=1", 0) == cell
    records.save(replace(cell, seconds=9.0), {})  # a newer record wins
    assert records.load("k=1", 0).seconds == 9.0
    assert json.loads((tmp_path / "arms" / "k=1-seed0.json").read_text())["kind"] == "arm of sweep or arms"
    with pytest.raises(UserError, match="is an arm of sweep or arms, no arm of compare; name another `output`"):
        ArmRecords(tmp_path, RecordKind.ARMS, PolicyArm).load("k=1", 0)


COMMON = "--model model --data rows.jsonl --held-out 0.3 --support auto:40 --batch-tokens 8 --epochs 2 --output out"


def test_sweep_from_the_command(folder, capsys, monkeypatch):
    extracted, run = counted(monkeypatch, making, "extract"), counted(monkeypatch, supervised, "run_cell")
    words = ["sweep", *COMMON.split(), "--seeds", "0,1"]
    assert main([*words, "--grid", "num_experts=4,8 support=auto:40,all", "--base", "num_experts=8 support=all"]) == 0
    assert (len(extracted), len(run)) == (1, 8)
    printed = capsys.readouterr().out
    assert "changes to num_experts=8 support=all are paired (second lines)" in " ".join(printed.split())
    table = json.loads((folder / "out" / "table.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert next(iter(rows)) == "base model"
    assert (len(rows), rows["num_experts=4 support=auto:40"]["seeds"]) == (5, 2)
    assert rows["num_experts=8 support=all"]["change"] is None
    assert rows["num_experts=4 support=auto:40"]["nll"]["all"]["value"] < rows["base model"]["nll"]["all"]["value"]
    assert rows["num_experts=8 support=all"]["parameters"] == 8 * (16 + 15 * 16) + 2  # of linear experts of rank 7
    assert main([*words, "--grid", "num_experts=4,8,2 support=auto:40"]) == 0
    assert (len(extracted), len(run)) == (1, 10)
    assert main([*words, "--grid", "num_experts=2", "--epochs", "3"]) == 2
    assert "run with --epochs 2, not 3" in capsys.readouterr().err


def test_an_interrupted_sweep_says_what_is_done_and_goes_on(folder, capsys, monkeypatch):
    run = counted(monkeypatch, cells_module, "fit")
    real, calls = supervised.run_cell, []

    def pressed_in_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(supervised, "run_cell", pressed_in_the_second)
    words = ["sweep", *COMMON.split(), "--seeds", "0", "--grid", "num_experts=4,8"]
    assert main(words) == 130
    assert "interrupted: 2 of 3 are done and kept in out/arms; run the same command again" in capsys.readouterr().err
    assert main(words) == 0
    assert len(run) == 2


def test_arms_from_the_command(folder, capsys, monkeypatch):
    words = ["arms", *COMMON.split(), "--seeds", "0,1", "--lora-rank", "2", "--lora-batch-size", "4"]
    assert main(words) == 0
    rows = {row["name"]: row for row in json.loads((folder / "out" / "table.json").read_text())["rows"]}
    arms = ["moe-bias", "static", "no-gate", "no-routing", "free", "full-vocabulary", "lora-head"]
    arms += ["lora-tokens", "lora-time"]
    assert list(rows) == ["base model", *arms]
    assert rows["moe-bias"]["change"] is None
    assert rows["lora-tokens"]["train_tokens"] >= rows["moe-bias"]["train_tokens"]
    assert rows["lora-time"]["seconds"] >= rows["moe-bias"]["seconds"]
    change = rows["lora-tokens"]["change"]["all"]
    assert change["low"] <= change["value"] <= change["high"]
    monkeypatch.setattr(arms_command, "opened", None)  # nothing is loaded for arms that are there
    assert main(words) == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2"])
def test_lora_is_measured_on_the_tokens_of_the_features(name):
    model = tiny_model(name)
    head = find_head(model)[1]
    features = with_scalars(head, run_backbone(model, EXAMPLES, 2, "test"), range(VOCABULARY), "test")
    base_T = token_nll(None, features, head)
    with lora_on(model, 2, seed=0) as adapted:  # fresh LoRA weights change nothing
        torch.testing.assert_close(lora_token_nll(adapted, EXAMPLES, 2), base_T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(-completion_log_prob(model, EXAMPLES), base_T, rtol=1e-4, atol=1e-4)


def test_lora_learns_within_its_budget_and_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with lora_on(model, 4, seed=0) as adapted:
        start = float(lora_token_nll(adapted, EXAMPLES, 3).mean())
        report = train_lora(adapted, EXAMPLES, LoRAChoices(4, 1e-2, 2), Budget(100, "tokens"), 0, "test")
        assert float(lora_token_nll(adapted, EXAMPLES, 3).mean()) < start - 0.2
    assert 100 <= report.tokens < 106
    linear = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert report.parameters == sum(4 * (module.in_features + module.out_features) for module in linear)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_lora_stops_when_its_time_is_over():
    with lora_on(tiny_model(), 2, seed=0) as adapted:
        report = train_lora(adapted, EXAMPLES, LoRAChoices(2, 1e-3, 2), Budget(0.2, "seconds"), 0, "test")
    assert 0.2 <= report.seconds < 5
    assert report.tokens > 0


def test_lora_whose_loss_is_not_finite_stops():
    with lora_on(tiny_model(), 2, seed=0) as adapted:
        next(p for p in adapted.parameters() if p.requires_grad).data.fill_(float("nan"))
        with pytest.raises(UserError, match="the loss of LoRA became nan; lower `lora_rate`"):
            train_lora(adapted, EXAMPLES, LoRAChoices(), Budget(10, "tokens"), 0, "test")
