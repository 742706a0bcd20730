"""`moe-bias analyze` as a command on a tiny model: what its record says, gone on with, and refused."""

import json
from pathlib import Path

import pytest

from helpers.calls import counted
from helpers.complaints import complaint
from helpers.saved import save_adapter
from moe_bias.analysis import entry as analysis_entry
from moe_bias.analysis import expert_views, flips, view_of_record
from moe_bias.api import data
from moe_bias.backbone import find_head
from moe_bias.cli import main
from moe_bias.config import ModelConfig
from moe_bias.features.extract import run_backbone
from moe_bias.frozen import load_model
from moe_bias.tasks.columns import read_conversations
from moe_bias.tasks.conversations import encode_all
from moe_bias.training.problems import policy_of, saved_layer

COMMON = "--model model --device cpu --flips 3 --contexts 2 --continuation 4"
DATA = f"{COMMON} --data rows.jsonl"
TASK = f"{COMMON} --problems problems.jsonl --gold-column gold --train-problems 4 --test-problems 9 --max-new-tokens 5"


@pytest.fixture
def folder(prepared_folder):
    return prepared_folder


@pytest.fixture
def adapter(folder):
    return save_adapter(folder / "adapter", "model")


def words(*more, source=DATA, output="out", adapters="adapter"):
    return ["analyze", *source.split(), "--adapter", adapters, "--output", output, *more]


def record_of(output="out"):
    return json.loads(Path(output, "analysis.json").read_text())


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_text_is_read_and_said(adapter, capsys):
    assert main(words()) == 0
    said, record = printed(capsys), record_of()
    assert record["format"] == "moe-bias analysis 2"
    assert record["text"]["tokens"] == 150  # 30 rows of a header, three words and an end
    (entry,) = record["adapters"]
    strata = entry["strata"]
    assert strata["high"]["tokens"] + strata["low"]["tokens"] == strata["all"]["tokens"] == 150
    assert sum(entry["histograms"]["adapted"]) == 150
    assert "150 tokens of 30 examples of rows.jsonl" in said
    assert "analysis.json is in out" in said
    cards = entry["experts"]
    assert sum(card["high"] for card in cards) == pytest.approx(1)
    assert sum(card["low"] for card in cards) == pytest.approx(1)
    assert cards[0]["raised"][0]["text"].startswith("w")
    assert entry["answers"] is None
    assert entry["checkpoints"] == []


def test_cards_of_linear_experts_say_what_they_read(folder, capsys):
    save_adapter(folder / "linear", "model", experts="linear", expert_rank=2)
    assert main(words(adapters="linear")) == 0
    said, (entry,) = printed(capsys), record_of()["adapters"]
    assert (entry["kind"], entry["rank"], entry["free_entries"], entry["reach"]) == ("linear", 2, False, "support")
    model, tokenizer = load_model(ModelConfig(model="model", device="cpu"))
    layer = saved_layer("linear", find_head(model)[1]).layer
    views = expert_views(layer, 8, tokenizer.decode)
    assert [view_of_record(card) for card in entry["experts"]] == views
    assert all(len(view.readings) == 2 for view in views)
    assert "What linear experts read" in said
    assert "Tokens in brackets: off the support" in said


def test_the_record_holds_what_the_model_does(adapter):
    """Against a direct pass of the model over the rows."""
    assert main(words()) == 0
    model, tokenizer = load_model(ModelConfig(model="model", device="cpu"))
    head = find_head(model)[1]
    layer = saved_layer("adapter", head).layer
    corpus = encode_all(read_conversations("rows.jsonl", "train"), tokenizer, 2048)
    tokens = run_backbone(model, corpus.examples, 16, "test")
    logits_TV = head.logits(tokens.hidden)
    adapted_TV = policy_of(layer, head)(tokens.hidden, logits_TV).detach()
    base, adapted = logits_TV.log_softmax(-1), adapted_TV.log_softmax(-1)
    kl_T = (adapted.exp() * (adapted - base)).sum(-1)
    means = record_of()["adapters"][0]["strata"]["all"]["means"]
    assert means["kl"]["value"] == pytest.approx(float(kl_T.mean()), rel=1e-3, abs=1e-6)
    flipped_T = logits_TV.argmax(-1) != adapted_TV.argmax(-1)
    assert means["flipped"]["value"] == pytest.approx(float(flipped_T.float().mean()))
    change_T = (adapted - base).gather(-1, tokens.token[:, None]).squeeze(-1)
    assert means["log_prob_change"]["value"] == pytest.approx(float(change_T.mean()), rel=1e-3)
    for flip in record_of()["adapters"][0]["flips"]:
        ways = [flip[f"{side}_continuation"].split()[:1] for side in ("base", "adapted")]
        assert ways == [flip[f"{side}_choice"]["text"].split() for side in ("base", "adapted")]


def test_a_store_gives_the_same_and_has_no_continuations_without_its_texts(adapter, capsys):
    assert main(words()) == 0
    extraction = "extract --model model --device cpu --data rows.jsonl --support auto:30 --output store"
    assert main(extraction.split()) == 0
    assert main(words(source=f"{COMMON} --store store", output="from-store")) == 0
    ours, theirs = record_of("from-store")["adapters"][0], record_of()["adapters"][0]
    for quantity, estimate in ours["strata"]["all"]["means"].items():
        expected = theirs["strata"]["all"]["means"][quantity]["value"]
        assert estimate["value"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert ours["mutual_information"]["class"] == pytest.approx(theirs["mutual_information"]["class"])
    assert [flip["base_continuation"] for flip in ours["flips"]] == [None] * len(ours["flips"])
    assert main(words(source=f"{DATA} --store store", output="with-texts")) == 0
    ours = record_of("with-texts")["adapters"][0]
    for side in ("base_continuation", "adapted_continuation"):
        assert [flip[side] for flip in ours["flips"]] == [flip[side] for flip in theirs["flips"]]


def test_the_features_that_training_kept_are_read(adapter, folder, capsys, monkeypatch):
    common = "--model model --data rows.jsonl --device cpu --held-out 0.3 --seed 4"
    kept = ["--features", "features"]
    training = f"train sft {common} --support auto:40 --epochs 1 --batch-tokens 16 --batch-size 4 --output run"
    assert main([*training.split(), *kept]) == 0
    save_adapter(folder / "other", "model", support=[3, 4, 9])
    before = Path("features/manifest.json").read_bytes()
    both = words(*kept, "--held-out", "0.3", "--seed", "4", adapters="run,other")
    with monkeypatch.context() as patch:
        patch.setattr(data, "stored", None)
        assert main(both) == 0
    assert "hidden states found in features" in printed(capsys)
    assert Path("features/manifest.json").read_bytes() == before
    assert main(words("--held-out", "0.3", "--seed", "4", adapters="run,other", output="again")) == 0
    for ours, theirs in zip(record_of()["adapters"], record_of("again")["adapters"], strict=True):
        for quantity, estimate in ours["strata"]["all"]["means"].items():
            expected = theirs["strata"]["all"]["means"][quantity]["value"]
            assert estimate["value"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    said = complaint(capsys, *words(*kept, "--max-length", "6", output="shorter"))
    assert said.startswith("'features' holds another feature store: it is of other examples, or of these cut elsewhere")
    extraction = "extract --model model --device cpu --data rows.jsonl --support all --keep-top 0.5 --output part"
    assert main(extraction.split()) == 0
    said = complaint(capsys, *words("--features", "part", output="in-part"))
    assert said.startswith("'part' holds another feature store: its keep_top is 0.5, here it is None")


def test_the_examples_that_training_kept_out_are_read_alone(adapter):
    common = "--model model --data rows.jsonl --device cpu --held-out 0.3 --seed 4"
    training = f"train sft {common} --support auto:40 --epochs 1 --batch-tokens 16 --output run"
    assert main(training.split()) == 0
    assert main(words("--held-out", "0.3", "--seed", "4", adapters="run")) == 0
    record, trained = record_of(), json.loads(Path("run/record.json").read_text())
    change = record["adapters"][0]["strata"]["all"]["means"]["log_prob_change"]["value"]
    assert -change == pytest.approx(trained["change"]["value"], rel=1e-3)
    assert record["text"]["examples"] == 9


def test_turns_of_one_conversation_are_kept_out_together(adapter):
    turns = [("user", "w5 w6"), ("assistant", "w7 w8"), ("user", "w9"), ("assistant", "w10")]
    messages = [{"role": role, "content": content} for role, content in turns]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(10)))
    common = "--model model --data chats.jsonl --train-on all-turns --device cpu --held-out 0.3 --seed 4"
    training = f"train sft {common} --support auto:40 --epochs 1 --batch-tokens 16 --output run"
    assert main(training.split()) == 0
    assert main(words("--held-out", "0.3", "--seed", "4", source=common, adapters="run")) == 0
    record, trained = record_of(), json.loads(Path("run/record.json").read_text())
    change = record["adapters"][0]["strata"]["all"]["means"]["log_prob_change"]["value"]
    assert record["text"]["examples"] == 2 * 3
    assert -change == pytest.approx(trained["change"]["value"], rel=1e-3)


def test_overlap_at_the_checkpoints_of_a_run(adapter):
    training = (
        "train sft --model model --data rows.jsonl --device cpu --support auto:40 --epochs 2 --batch-tokens 16"
        " --checkpoint-every 1 --keep-checkpoints 3 --output run"
    )
    assert main(training.split()) == 0
    assert main(words(adapters="run")) == 0
    entry = record_of()["adapters"][0]
    steps = sorted(int(path.stem.partition("-")[2]) for path in Path("run/checkpoints").iterdir())
    assert [point["step"] for point in entry["checkpoints"]] == steps
    assert entry["checkpoints"][-1]["overlap"] == entry["overlap"]
    assert entry["checkpoints"][-1]["kl"] == entry["strata"]["all"]["means"]["kl"]
    assert entry["checkpoints"][0]["kl"] != entry["checkpoints"][-1]["kl"]
    assert main(words("--no-checkpoints", adapters="run", output="without")) == 0
    assert record_of("without")["adapters"][0]["checkpoints"] == []


@pytest.fixture
def problems(adapter, folder):
    rows = [{"problem": f"w{5 + n} w6", "gold": str(n), "solution": "w9"} for n in range(20)]
    (folder / "problems.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_answers_to_a_task(problems):
    assert main(words(source=TASK)) == 0
    record = record_of()
    answers = record["adapters"][0]["answers"]
    base = json.loads(Path("out/base-answers.json").read_text())["answers"]
    assert len(base) == record["text"]["examples"] == 9
    assert record["text"]["tokens"] == sum(len(answer["token_ids"]) for answer in base)
    assert set(answers["accuracy"]) == {"base", "adapted", "adapted, high only", "adapted, low only"}
    assert sum(answers["turns"].values()) == 9
    assert len(answers["flips"]) + answers["unchanged"] == 9
    assert answers["flips"]
    for flip in answers["flips"]:
        assert flip["base_choice"] == flip["token"]
        assert flip["base_choice"] != flip["adapted_choice"]
        assert flip["base_continuation"].split()[0] == flip["base_choice"]["text"]
        assert flip["adapted_continuation"].split()[0] == flip["adapted_choice"]["text"]


def test_adapters_that_are_done_are_not_read_again(adapter, folder, monkeypatch, capsys):
    save_adapter(folder / "second", "model", support=[3, 4, 9])
    both = words(adapters="adapter,second")
    real, calls = analysis_entry.survey, []

    def stopped(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(analysis_entry, "survey", stopped)
    assert main(both) == 130
    assert "1 of 2 adapters are done" in capsys.readouterr().err
    assert main(both) == 0
    assert calls == ["adapter", "second", "second"]
    record = record_of()
    monkeypatch.setattr(analysis_entry, "survey", real)
    assert main(words(adapters="adapter,second", output="whole")) == 0
    assert record_of("whole")["adapters"] == record["adapters"]
    assert [entry["name"] for entry in record["adapters"]] == ["adapter", "second"]


def test_sampled_answers_are_not_sampled_again(problems, monkeypatch):
    sampled = counted(monkeypatch, flips, "greedy_graded")
    assert main(words(source=TASK)) == 0
    assert len(sampled) == 2  # the frozen model's, and the adapter's
    Path("out/adapters/0.json").unlink()
    assert main(words(source=TASK)) == 0
    assert len(sampled) == 3


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--store", "store", "--task", "products"], "--store store and --task products exclude each other"),
        (["--rho", "1"], "rho from --rho is '1'"),
        (["--adapter", "nowhere"], "'nowhere' is neither a folder nor an adapter that the Hub delivered"),
        (["--data", "", "--problems", "problems.jsonl", "--held-out", "0.5"], "--held-out 0.5 does not apply"),
        (["--data", ""], "one of --store, --data, --task and --problems is required"),
        (["--store", "nowhere"], "'nowhere' holds no feature store"),
    ],
)
def test_mistakes(adapter, capsys, more, sentence):
    assert sentence in complaint(capsys, *words(*more))
    assert not Path("out").exists()


def test_an_adapter_of_another_model_is_refused(adapter, folder, capsys):
    tensors = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(tensors | {"hidden_size": 99}))
    assert "damaged" in complaint(capsys, *words())
    assert not Path("out").exists()


def test_a_folder_of_another_analysis_is_refused(adapter, folder, capsys):
    assert main(words()) == 0
    assert "--rho 0.2, not 0.5" in complaint(capsys, *words("--rho", "0.5"))
    save_adapter(folder / "adapter", "model", num_experts=4)
    assert "other adapter adapter" in complaint(capsys, *words())
