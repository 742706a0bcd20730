"""The benchmarks' own sums, on a random model of a million parameters: what is measured must be the same update."""

import json

import numpy as np
import pytest
import torch

import assisted
import draft
import draw_growth
import growth
import side_by_side
import update
from corpus import corpus_of, model_of, shaped_config
from helpers.saved import save_model
from lora_arm import Form, LoRAArm
from moe_bias.mistakes import UserError
from update_arms import DEFAULT, EVERYTHING, LAYER_ARMS, head_autograd, lora_head_support, support_autograd

SHAPE = "64,512,1000000"
TOKENS, SUPPORT = 1300, 100


def options(*words):
    return update.parsed(["--shape", SHAPE, "--device", "cpu", *words])


@pytest.fixture(scope="module")
def corpus():
    return corpus_of(model_of(options()), 700)


@pytest.fixture
def records(tmp_path, monkeypatch):
    folder = tmp_path / "records" / "benchmarks"
    monkeypatch.setattr(side_by_side, "RECORDS", folder)
    return folder


@pytest.mark.parametrize(
    ("reference", "arms"), [("head-autograd", ["full"]), ("support-autograd", ["support", "kept"])]
)
def test_arms_learn_the_same_from_an_epoch(corpus, reference, arms):
    expected = LAYER_ARMS[reference](corpus, TOKENS, SUPPORT)
    assert expected() == TOKENS
    assert expected.layer.experts.abs().max() > 1e-3
    for name in arms:
        arm = LAYER_ARMS[name](corpus, TOKENS, SUPPORT)
        assert arm() == TOKENS
        # Adam divides by the gradient's size, so an entry whose gradient is rounding moves by up to the rate.
        difference = (arm.layer.experts - expected.layer.experts).abs()
        assert difference.mean() < 1e-5, name


@pytest.mark.parametrize(
    ("reference", "arms"),
    [(head_autograd, ["default-full"]), (support_autograd, ["default-support", "default-kept"])],
)
def test_arms_of_the_default_layer_learn_the_same_from_an_epoch(corpus, reference, arms):
    expected = reference(corpus, TOKENS, SUPPORT, DEFAULT)
    expected()
    assert expected.layer.directions.abs().max() > 1e-3
    for name in arms:
        arm = LAYER_ARMS[name](corpus, TOKENS, SUPPORT)
        arm()
        for own, others in zip(arm.layer.parameters(), expected.layer.parameters(), strict=True):
            assert (own - others).abs().mean() < 1e-5, name


def test_lora_at_the_head_learns_the_same_through_the_reduced_softmax(corpus):
    expected = LAYER_ARMS["lora-head"](corpus, TOKENS, SUPPORT)
    assert expected() == TOKENS
    assert expected.layer.b_MR.abs().max() > 1e-3
    for budget in (0, EVERYTHING):
        arm = lora_head_support(corpus, TOKENS, corpus.head.vocab_size, budget)
        arm()
        assert (arm.layer.b_MR - expected.layer.b_MR).abs().mean() < 1e-5
        assert (arm.layer.a_RD - expected.layer.a_RD).abs().mean() < 1e-5


def test_forks_are_a_fifth_of_the_tokens_and_count_as_all(corpus):
    arm = LAYER_ARMS["kept-top20"](corpus, 700, SUPPORT)
    assert sum(len(index) for index in arm.batches) == 140
    assert arm() == 700


def test_a_longer_corpus_repeats_its_tokens(corpus):
    features = corpus.features(SUPPORT, TOKENS)
    assert len(features) == TOKENS
    assert torch.equal(features.hidden[700:], features.hidden[:600])
    assert torch.equal(features.column[700:], features.column[:600])


def test_both_losses_of_lora_have_one_gradient():
    losses, gradients = [], []
    for chunked in (False, True):
        torch.manual_seed(0)
        arm = LoRAArm(model_of(options()))
        hidden_TD = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = arm.loss(hidden_TD, torch.arange(200), chunked)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(hidden_TD.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_step_of_lora_changes_only_lora():
    model = model_of(options())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arm = LoRAArm(model)
    assert arm.step(Form(2, 16)) == 32
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(tensor.abs().max() > 0 for name, tensor in after.items() if "lora_B" in name)


def test_a_shape_comes_near_its_parameters():
    # Per layer 4 * 64^2 + 3 * 64 * 192 + 2 * 64 = 53,376; (1,000,000 - 2 * 512 * 64) / 53,376 = 17.5: 18 layers.
    assert shaped_config(SHAPE).num_hidden_layers == 18
    assert model_of(options()).num_parameters() == pytest.approx(1e6, rel=0.03)
    layers = shaped_config("4096,128256,8000000000").num_hidden_layers
    assert layers == 34


@pytest.mark.parametrize("shape", ["64,512", "64,512,x", "65,512,1000", "64,0,1000"])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(UserError, match="--shape"):
        shaped_config(shape)


def test_time_over_the_limit():
    # Medians of paired rounds: a pass of 100 and 200 tokens/s, kept at 50 and 100: twice the time. On a fifth
    # of the tokens the limit is five times as fast, 500 and 1,000: at 250 and 500 twice the time again.
    rates = {"pass": [100.0, 200.0], "kept": [50.0, 100.0], "kept-top20": [250.0, 500.0]}
    assert update.times_the_limit(rates, "kept").median == pytest.approx(2)
    assert update.times_the_limit(rates, "kept-top20").median == pytest.approx(2)


def test_update_writes_a_record(records):
    update.measure(options("--tokens", "600", "--lora-tokens", "32", "--support", "64", "--rounds", "2", "--no-memory"))
    (path,) = records.glob("update-*.json")
    record = json.loads(path.read_text())
    assert set(record["rates"]) == {"lora", *LAYER_ARMS}
    assert record["ratio_to_lora"]["full"]["median"] > 0
    assert record["lora"]["form"] in record["lora"]["tokens_per_second_of_forms"]


def test_a_support_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="--support 513 does not fit a vocabulary of 512"):
        update.measure(options("--tokens", "128", "--support", "513"))


def test_growth_records_what_it_did_not_keep(records, monkeypatch):
    monkeypatch.setattr(growth, "SUPPORTS", (64, 4096))
    # 4 * 256 * 64 = 65,536 bytes fit; 4 * 512 * 64 and 4 * 256 * 512 do not.
    growth.measure_growth(options("--growth", "256", "512", "--budget", str(65536 / 2**30)))
    (path,) = records.glob("growth-*.json")
    record = json.loads(path.read_text())
    found = {(cell["arm"], cell["support"], cell["tokens"]): cell["seconds"] for cell in record["cells"]}
    assert {key for key, seconds in found.items() if seconds is None} == {
        ("kept", 64, 512),
        ("kept", 512, 256),
        ("kept", 512, 512),
    }
    assert {key[0] for key in found} == {"support", "full", "kept"}


def cells_of_slope(power):
    return [
        {"arm": arm, "support": 64, "tokens": tokens, "seconds": None if arm == "kept" else 1e-3 * tokens**power}
        for arm in ("support", "kept")
        for tokens in (100, 400, 1600)
    ]


def test_the_figure_fits_slopes_and_is_the_same_bytes_again():
    record = {"cells": cells_of_slope(1.5)}
    ((tokens, seconds),) = draw_growth.lines_of(record["cells"]).values()
    assert draw_growth.slope(tokens, seconds) == "1.50"
    assert np.allclose(seconds, [1.0, 8.0, 64.0])
    assert draw_growth.svg(record) == draw_growth.svg(record)
    assert draw_growth.svg({"cells": cells_of_slope(1.0)}) != draw_growth.svg(record)


@pytest.fixture
def pair(folder, monkeypatch):
    """A draft and a target as folders, rows, and options of both benchmarks."""
    monkeypatch.setenv("MOE_BIAS_CACHE", str(folder / "cache"))
    small, large = save_model(folder / "small"), save_model(folder / "large", hidden_size=24)
    rows = [{"question": f"w{5 + n} w6", "answer": f"w{9 + n % 3} w{20 + n % 5} w9"} for n in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--small", small, "--large", large, "--data", str(folder / "rows.jsonl"), "--device", "cpu"]


def test_drafts_are_measured_on_every_text_and_then_used(pair, folder, records, monkeypatch):
    more = ["--other", f"again={folder / 'rows.jsonl'}", "--support", "auto:40", "--epochs", "2", "--held-out", "0.3"]
    kept = ["--features", str(folder / "features"), "--adapters", str(folder / "adapters")]
    monkeypatch.setattr("sys.argv", ["draft.py", *pair, *more, *kept])
    draft.main()
    (path,) = records.glob("draft-*.json")
    found = json.loads(path.read_text())
    assert found["models"] == {"draft": "small", "target": "large"}
    assert set(found["texts"]) == {"rows", "again"}
    assert [row["name"] for row in found["texts"]["rows"]["rows"]] == ["plain", "static", "moe-bias"]
    plain, _, adapted = found["texts"]["rows"]["rows"]
    assert adapted["kl"]["value"] < plain["kl"]["value"]
    assert found["arms"]["static"]["parameters"] < found["arms"]["moe-bias"]["parameters"]
    assert str(folder) not in path.read_text()

    adapters = [f"--adapter={name}={folder / 'adapters' / name}" for name in draft.ARMS]
    monkeypatch.setattr("sys.argv", ["assisted.py", *pair, *adapters, "--prompts", "3", "--max-new-tokens", "7"])
    assisted.main()
    (path,) = records.glob("assisted-*.json")
    found = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(found) == {"plain", "static", "moe-bias", "alone"}
    assert all(row["same_answer"] == 1 for row in found.values())
    assert found["alone"]["tokens_a_pass"]["value"] == pytest.approx(1)
    assert found["plain"]["tokens_a_pass"]["value"] >= 1
    assert str(folder) not in path.read_text()
