"""Hidden states that commands extract on the fly: kept, found again, gone on with, or removed; and stores for all."""

import json
import os
import shutil
import signal
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from helpers.calls import counted
from helpers.cells import cell_of
from helpers.stores import contents, in_child
from helpers.training_processes import ADAPTER
from moe_bias.api import data
from moe_bias.cli import main
from moe_bias.experiments.arms import lora_budget
from moe_bias.features import build, making
from moe_bias.features.store import FeatureStore
from moe_bias.folder_lock import LOCK, NOTE
from moe_bias.training.checkpoint import Checkpoints

DATA = "--model model --data rows.jsonl --device cpu"
TRAINING = "--batch-tokens 16 --epochs 1"


@pytest.fixture
def folder(prepared_folder):
    return prepared_folder


@pytest.fixture
def passes(folder, monkeypatch):
    """A list with an entry for each pass through the backbone."""
    return counted(monkeypatch, build, "completion_hidden")


def words(command, output, *more, source=DATA):
    support = [] if "--store" in source or "--support" in more else ["--support", "auto:40"]
    return [*command.split(), *source.split(), *TRAINING.split(), *support, "--output", str(output), *more]


STORE = "--model model --store store --device cpu"
ARMS = ["moe-bias", "static", "no-gate", "no-routing", "free", "full-vocabulary", "lora-head"]


def printed(capsys):
    """What was printed, on one line."""
    return " ".join(capsys.readouterr().out.split())


def kept():
    """The stores in the cache."""
    return sorted(Path("cache/features").iterdir()) if Path("cache/features").exists() else []


def small_shards(monkeypatch):
    monkeypatch.setattr(data, "Choices", partial(build.Choices, shard_tokens=20))


def test_a_second_run_finds_the_hidden_states_of_the_first(passes, capsys):
    assert main(words("train sft", "first")) == 0
    assert len(passes) > 0
    size = f"{FeatureStore.open(*kept()).manifest.bytes / 1024:.1f} KiB"
    said = printed(capsys)
    assert "150 completion tokens of 30 examples" in said
    assert f"{size} of hidden states stay there for later runs; the folder can be dele" in said
    passes.clear()
    assert main(words("train sft", "second")) == 0
    assert passes == []
    assert f"hidden states found in {kept()[0].absolute()}, {size}: the model is n" in printed(capsys)
    assert Path("first", ADAPTER).read_bytes() == Path("second", ADAPTER).read_bytes()
    assert main(words("sweep", "third", "--grid", "epochs=1", "--seeds", "0")) == 0
    assert passes == []
    assert len(kept()) == 1
    shutil.move("model", "elsewhere")  # a store is known by what the model computes, not by its name
    assert main([*words("train sft", "fourth"), "--model", "elsewhere"]) == 0
    assert passes == []


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        (["--support", "auto:41"], True),
        (["--max-length", "7"], True),
        (["--seed", "1"], True),
        (["--epochs", "2"], False),
    ],
)
def test_what_decides_the_hidden_states_makes_another_store(folder, change, is_other):
    assert main(words("train sft", "first")) == 0
    assert main(words("train sft", "second", *change)) == 0
    assert len(kept()) == 1 + is_other


def test_changed_data_makes_another_store(folder):
    assert main(words("train sft", "first")) == 0
    rows = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(rows.replace("w20", "w33"))
    assert main(words("train sft", "second")) == 0
    assert len(kept()) == 2


def test_who_is_held_out_matters_only_to_a_support_that_is_chosen(folder):
    assert main(words("train sft", "first", "--support", "all")) == 0
    assert main(words("train sft", "second", "--support", "all", "--seed", "1")) == 0
    assert len(kept()) == 1


def test_features_that_are_not_kept_leave_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    Path("temporary").mkdir()
    assert main(words("train sft", "kept")) == 0
    before = contents(kept()[0])
    assert main(words("train sft", "removed", "--no-keep-features")) == 0
    assert main(words("sweep", "swept", "--no-keep-features", "--grid", "epochs=1", "--seeds", "0")) == 0
    assert list(Path("temporary").iterdir()) == []
    assert [contents(path) for path in kept()] == [before]
    assert Path("kept", ADAPTER).read_bytes() == Path("removed", ADAPTER).read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "completion_hidden", interrupted)
    assert main(words("train sft", "other", "--no-keep-features")) == 130
    assert "interrupted: the same command goes on from the beginning" in capsys.readouterr().err
    assert list(Path("temporary").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_killed_extraction_goes_on_after_the_last_whole_shard(passes, monkeypatch):
    small_shards(monkeypatch)
    assert main(words("train sft", "whole", "--features", "whole-features")) == 0
    everything = len(passes)
    count, real = [0], build.completion_hidden

    def dies(*arguments):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(build, "completion_hidden", dies)
        assert in_child(lambda: main(words("train sft", "cut"))) == signal.SIGKILL
    assert {path.name for path in Path("cut").iterdir()} == {LOCK, NOTE}
    unfinished = json.loads((kept()[0] / "unfinished.json").read_text())
    assert 0 < len(unfinished["shards"]) < unfinished["num_shards"]
    passes.clear()
    assert main(words("train sft", "cut")) == 0
    assert len(passes) == unfinished["num_shards"] - len(unfinished["shards"]) < everything
    assert Path("cut", ADAPTER).read_bytes() == Path("whole", ADAPTER).read_bytes()


def test_an_interrupted_extraction_says_what_is_whole(folder, monkeypatch, capsys):
    small_shards(monkeypatch)
    count, real = [0], build.completion_hidden

    def pressed(*arguments):
        count[0] += 1
        if count[0] % 3 == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(build, "completion_hidden", pressed)
    for command, whole in (("train sft", 0), ("sweep --grid epochs=1", 2)):
        assert main(words(command, "out", "--features", "features")) == 130
        sentence = f"{whole} of 8 shards are whole in 'features'; the same command continues there"
        assert sentence in " ".join(capsys.readouterr().err.split()), command


def test_a_folder_of_ones_own(folder, capsys):
    assert main(words("train sft", "first", "--features", "mine")) == 0
    assert kept() == []
    assert main(["train", "sft", *f"--model model --store mine {TRAINING} --output stored --device cpu".split()]) == 0
    assert Path("first", ADAPTER).read_bytes() == Path("stored", ADAPTER).read_bytes()
    capsys.readouterr()
    assert main(words("train sft", "second", "--features", "mine", "--support", "all")) == 2
    assert "'mine' holds another feature store: its support is 'auto:40', here it is " in capsys.readouterr().err
    assert main(words("train sft", "second", "--features", "rows.jsonl/features")) == 2
    sentence = "'rows.jsonl/features' cannot be written (Not a directory); name another folder"
    assert sentence in capsys.readouterr().err


def test_two_runs_at_once_extract_once(passes, monkeypatch, capsys):
    assert main(words("train sft", "out", "--features", "made")) == 0
    passes.clear()
    held, waited_for = threading.Event(), threading.Event()
    say = making.say

    def heard(console, sentence):
        say(console, sentence)
        if sentence.endswith("waiting for it"):
            waited_for.set()

    monkeypatch.setattr(making, "say", heard)

    def making_it():
        with FileLock("mine/.lock"):
            held.set()
            waited_for.wait(60)
            shutil.copytree("made", "mine", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))

    Path("mine").mkdir()
    other = threading.Thread(target=making_it)
    other.start()
    held.wait()
    assert main(words("train sft", "second", "--features", "mine")) == 0
    other.join()
    assert "another process is making the store in mine; waiting for it" in printed(capsys)
    assert passes == []


def test_answers_that_the_limit_cuts_are_counted(folder, capsys):
    # A question is w3, two words and what the template adds; with its answer of five tokens it has eight or more.
    assert main(words("train sft", "out", "--max-length", "5")) == 0
    assert "30 of 30 answers are cut: with their prompts they exceed 5" in printed(capsys)


def extract_to(store, *more):
    assert main(["extract", *DATA.split(), "--output", store, *more]) == 0


def rows_of(output):
    rows = json.loads(Path(output, "table.json").read_text())["rows"]
    return {row["name"]: {name: value for name, value in row.items() if name != "seconds"} for row in rows}


def test_a_sweep_over_a_store_is_the_sweep_over_its_data(passes):
    grid = ["--grid", "support=all,auto:40 num_experts=4", "--seeds", "0", "--held-out", "0.3"]
    extract_to("store", "--support", "all")
    passes.clear()
    assert main(words("sweep", "stored", *grid, source="--model model --store store --device cpu")) == 0
    assert passes == []
    assert main(words("sweep", "data", *grid, "--support", "all")) == 0
    assert rows_of("stored") == rows_of("data")
    # 'auto:40' from the stored hidden states is what an extraction on it has, but for how sums were rounded.
    assert main(words("sweep", "chosen", *grid, "--support", "auto:40")) == 0
    for name, row in rows_of("chosen").items():
        assert row["nll"]["all"]["value"] == pytest.approx(rows_of("data")[name]["nll"]["all"]["value"], rel=1e-4)


def test_a_store_without_a_support_given_is_swept_on_its_own(folder, monkeypatch):
    Path("ids.json").write_text("[2, 9, 10, 11, 20]")
    extract_to("store", "--support", "ids.json")
    assert (
        main(
            words(
                "sweep",
                "out",
                "--grid",
                "num_experts=4 experts=free",
                source="--model model --store store --device cpu",
            )
        )
        == 0
    )
    assert rows_of("out")["num_experts=4 experts=free"]["parameters"] == 4 * (5 + 16) + 2
    record = json.loads(next(Path("out/arms").glob("num_experts*")).read_text())
    assert record["settings"]["support"] == "own"


def test_arms_from_a_store_are_those_of_the_layer(folder, capsys):
    extract_to("store", "--support", "auto:40")
    capsys.readouterr()
    assert main(words("arms", "out", "--seeds", "0", source="--model model --store store --device cpu")) == 0
    assert "lora-tokens and lora-time are left out: they need the texts, which --data gives" in printed(capsys)
    rows = rows_of("out")
    assert list(rows) == ["base model", *ARMS]
    assert rows["moe-bias"]["parameters"] == rows["full-vocabulary"]["parameters"] == 4 * (16 + 15 * 16) + 2
    assert rows["free"]["parameters"] == 16 * (40 + 16) + 2
    assert rows["lora-head"]["parameters"] == 8 * (40 + 16)
    assert main(words("arms", "two", "--seeds", "0", "--arms", "static,lora-head", "--no-lora", source=STORE)) == 0
    assert list(rows_of("two")) == ["base model", "moe-bias", "static", "lora-head"]
    assert main(words("arms", "none", "--arms", "dense", source=STORE)) == 2
    assert "--arms names 'dense'; choose among moe-bias, static" in capsys.readouterr().err


def test_arms_from_a_store_with_its_texts_are_those_of_data(folder, capsys):
    extract_to("store", "--support", "auto:40")
    source = "--model model --store store --data rows.jsonl --device cpu"
    assert main(words("arms", "out", "--seeds", "0", "--lora-tokens", "20", source=source)) == 0
    rows = rows_of("out")
    assert list(rows)[-2:] == ["lora-tokens", "lora-time"]
    assert rows["lora-tokens"]["train_tokens"] >= 20
    assert rows["moe-bias-tokens"]["train_tokens"] == 20
    assert main(words("arms", "without", "--seeds", "0", "--no-lora", source=source)) == 0
    assert "lora-tokens" not in rows_of("without")
    (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text().replace("w9", "w8"))
    capsys.readouterr()
    assert main(words("arms", "other", "--seeds", "0", source=source)) == 2
    assert "the store in store was not extracted from rows.jsonl" in capsys.readouterr().err


def test_lora_has_its_own_budget_of_tokens_where_one_is_given(folder):
    main_arm = cell_of("moe-bias", 0, [1.0, 1.0])  # trained on 100 tokens in 1.5 s, after a pass of 0.5 s
    assert (lora_budget("lora-tokens", main_arm, None).amount, lora_budget("lora-tokens", main_arm, 7).amount) == (
        100,
        7,
    )
    assert lora_budget("lora-time", main_arm, 7).amount == 2.0
    assert main(words("arms", "out", "--seeds", "0", "--lora-tokens", "9", "--lora-batch-size", "2")) == 0
    rows = rows_of("out")
    assert 9 <= rows["lora-tokens"]["train_tokens"] < 9 + 2 * 5
    assert rows["moe-bias"]["train_tokens"] > 100


def test_a_run_does_not_go_on_with_other_hidden_states(folder, monkeypatch, capsys):
    stored = words("train sft", "out", "--checkpoint-every", "1", source="--model model --store store --device cpu")
    extract_to("store", "--support", "all")
    save = Checkpoints.save

    def stop_after_saving(self, tensors, position):
        save(self, tensors, position)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop_after_saving)
        assert main(stored) == 130
    shutil.move("store", "first")
    extract_to("store", "--support", "all", "--dtype", "bfloat16")
    assert main(stored) == 2
    assert "'out' holds an unfinished run with other hidden states; give what it was started" in capsys.readouterr().err
    shutil.rmtree("store")
    shutil.move("first", "store")
    assert main(stored) == 0
