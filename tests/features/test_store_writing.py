import builtins
import errno
import os
import re
import shutil
import signal
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from helpers.models import tiny_model
from helpers.stores import FACTS, SUPPORT, contents, corpus_of, die_at, in_child, make_store, plan_of
from moe_bias.backbone import find_head
from moe_bias.features import build
from moe_bias.features.build import extract
from moe_bias.features.extract import evenly_spaced
from moe_bias.features.store import FeatureStore
from moe_bias.mistakes import Interrupted, UserError
from moe_bias.tasks.conversations import Corpus, Example

CHOICES = {"keep_top": 0.5, "support": 20}
"""Both of what is calibrated, so that a continued run has all of it to read back."""


def make(folder: Path) -> None:
    make_store(folder, corpus_of(8), **CHOICES)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A store made in one go, in a child as the interrupted ones are."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    assert in_child(lambda: make(folder)) == 0
    return contents(folder)


def make_and_die(folder: Path, step: int) -> None:
    """Makes a store in a process that kills itself before its `step`-th sync, rename or removal of a file."""
    die_at(step, (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"))
    make(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_killed_at_any_step_a_second_run_ends_with_the_same_bytes(tmp_path, uninterrupted):
    step, status = 0, signal.SIGKILL
    while status == signal.SIGKILL:
        step += 1
        folder = tmp_path / str(step)
        status = in_child(lambda folder=folder, step=step: make_and_die(folder, step))
        if status == signal.SIGKILL:
            with pytest.raises(UserError):
                FeatureStore.open(folder)
            assert in_child(lambda folder=folder: make(folder)) == 0
        assert contents(folder) == uninterrupted, step
    assert status == 0
    assert step > 20  # each shard is synced, renamed, listed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_killed_again_and_again_it_still_ends(tmp_path, uninterrupted):
    # A shard takes 12 steps, so that each run gets one further.
    folder, runs = tmp_path / "store", 0
    while in_child(lambda: make_and_die(folder, 16)) == signal.SIGKILL:
        runs += 1
        assert runs < 50
    assert runs >= 2
    assert contents(folder) == uninterrupted


def test_whole_shards_are_not_made_again(tmp_path, monkeypatch):
    make_store(tmp_path, corpus_of())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def never(*args):
        raise AssertionError("the model was run")

    monkeypatch.setattr(build, "completion_hidden", never)
    make_store(tmp_path, corpus_of())
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_an_interrupt_says_what_is_whole(tmp_path, monkeypatch):
    passes = 0
    run = build.completion_hidden

    def interrupted(*args):
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(build, "completion_hidden", interrupted)
    with pytest.raises(Interrupted, match=r"2 of \d shards are whole in .*; the same call continues there"):
        make_store(tmp_path / "store", corpus_of())
    monkeypatch.undo()
    make_store(tmp_path / "store", corpus_of())
    make_store(tmp_path / "other", corpus_of())
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"corpus": corpus_of(seed=1)}, "it is of other examples, or of these cut elsewhere, from "),
        ({"facts": FACTS.model_copy(update={"head": "x"})}, "its model.head is .*, here it is "),
        ({"facts": FACTS.model_copy(update={"compute_dtype": "bfloat16"})}, "its model.compute_dtype is .*, here "),
        ({"part": (1, 2)}, "its part is .*, here it is "),
        ({"support": 5}, "its support is .*, here it is "),
        ({"support": [2, 8, 11]}, "its support is .*, here it is "),
        ({"keep_top": 0.5}, "its keep_top is .*, here it is "),
        ({"hidden_dtype": torch.bfloat16}, "its hidden_dtype is .*, here it is "),
        ({"batch_size": 3}, "its batch_size is .*, here it is "),
        ({"shard_tokens": 10}, "its shard_tokens is .*, here it is "),
    ],
)
@pytest.mark.parametrize("file", ["manifest.json", "unfinished.json"])
def test_another_store_is_not_overwritten(tmp_path, changes, difference, file):
    make_store(tmp_path)
    (tmp_path / "manifest.json").rename(tmp_path / file)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"holds another feature store: {difference}.*; name another"):
        make_store(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_other_files_are_not_written_among(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; name a new folder or an empty one"):
        make_store(tmp_path)
    with pytest.raises(UserError, match="is a file; name a folder"):
        make_store(tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_two_runs_that_start_at_once_do_not_mix(tmp_path, monkeypatch):
    measure = build.measure_fork_mass

    def meanwhile(*args):
        if not tmp_path.joinpath("store").exists():
            tmp_path.joinpath("store").mkdir()
            make_store(tmp_path / "store", part=(2, 2))
        return measure(*args)

    monkeypatch.setattr(build, "measure_fork_mass", meanwhile)
    with pytest.raises(UserError, match="holds other files"):
        make_store(tmp_path / "store", part=(1, 2), support=20)
    assert FeatureStore.open(tmp_path / "store").manifest.recipe.part == (2, 2)


def test_what_is_held_out_matters_where_something_is_chosen(tmp_path):
    make_store(tmp_path / "given", held_out=[1])
    assert make_store(tmp_path / "given", held_out=[4]).recipe.held_out is None
    make_store(tmp_path / "chosen", support=5, held_out=[1])
    with pytest.raises(UserError, match="holds another feature store: its held_out is "):
        make_store(tmp_path / "chosen", support=5, held_out=[4])


def test_seconds_are_added_up_over_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "completion_hidden", None)
    with pytest.raises(TypeError):
        make_store(tmp_path)
    (tmp_path / "seconds.json").write_text('{"seconds": 1000}')
    monkeypatch.undo()
    make_store(tmp_path)
    assert 1000 < FeatureStore.open(tmp_path).seconds < 1060
    (tmp_path / "seconds.json").unlink()
    assert FeatureStore.open(tmp_path).seconds == 0


def test_too_little_disk_is_refused_before_the_model_runs(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    monkeypatch.setattr(build, "completion_hidden", None)
    with pytest.raises(UserError, match=r"needs 4\.\d KiB and its disk has 1000 B free; make room, name another disk"):
        make_store(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def fill_the_disk(monkeypatch, after: int) -> None:
    """Writing fails with 'no space left' once `after` shards were written."""
    opened = builtins.open
    written = 0

    def full(path, mode="r", *args, **kwargs):
        nonlocal written
        file = opened(path, mode, *args, **kwargs)
        if "w" in mode and "shard-" in str(path):
            written += 1
            if written > after:
                file.close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: full(path, *args, **kwargs))


def test_a_full_disk_leaves_the_whole_shards_and_says_so(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch, after=2)
    with pytest.raises(UserError, match=r"the disk of .* is full: 2 of \d shards are whole in .*; the same call"):
        make_store(tmp_path / "store")
    names = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert names == ["seconds.json", "shard-00000.safetensors", "shard-00001.safetensors", "unfinished.json"]
    monkeypatch.undo()
    make_store(tmp_path / "store")
    make_store(tmp_path / "other")
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, tmp_path, monkeypatch):
    corpus = corpus_of(100)
    monkeypatch.setattr(build, "SMALL_BYTES", -60)  # an estimate that is too low, so that writing starts
    with pytest.raises(UserError, match=r"the disk of .* is full: [1-9]\d* of \d+ shards are whole"):
        make_store(small_disk / "store", corpus)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"needs .* and its disk has .* free"):
        make_store(small_disk / "store", corpus)
    assert not [path for path in (small_disk / "store").iterdir() if path.name.startswith(".")]
    shutil.copytree(small_disk / "store", tmp_path / "store")
    make_store(tmp_path / "store", corpus)
    make_store(tmp_path / "other", corpus)
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_support_and_threshold_are_the_same_for_all_parts(tmp_path):
    corpus = corpus_of(20)
    manifests = [
        make_store(tmp_path / str(part), corpus, support=20, keep_top=0.4, part=(part, 3), always=[90])
        for part in (1, 2, 3)
    ]
    assert len({tuple(manifest.support) for manifest in manifests}) == 1
    assert len({manifest.threshold for manifest in manifests}) == 1
    assert 90 in manifests[0].support
    FeatureStore.open(*(tmp_path / str(part) for part in (1, 2, 3)))


def test_calibration_sample_is_spread_over_the_corpus():
    # 45 of 1,000 tokens in 100 examples are 4.5 examples, so 5.
    assert evenly_spaced([10] * 100, tokens=45) == [0, 20, 40, 60, 80]
    assert evenly_spaced([10] * 100, tokens=10**6) == list(range(100))


def test_parts_and_shards_cut_the_corpus_without_loss():
    corpus = corpus_of(23)
    plans = [plan_of(corpus, part=(number, 4)) for number in (1, 2, 3, 4)]
    assert sorted(row for plan in plans for row in plan.rows) == corpus.rows
    for plan in plans:
        cut = [example for chosen in plan.shards for example in plan.examples[chosen]]
        assert cut == plan.examples
        tokens = [sum(len(e.completion_ids) for e in plan.examples[chosen]) for chosen in plan.shards]
        assert all(count >= 9 for count in tokens[:-1])


def test_plans_that_cannot_be():
    with pytest.raises(UserError, match=r"part 13 of 13 of rows.jsonl is empty: it has 12 examples in all"):
        plan_of(part=(13, 13))
    foreign = Corpus([Example([5], [97])], [0], 0)
    with pytest.raises(UserError, match="the tokenizer gave token id 97, the model 'tiny' has a vocabulary of 97"):
        plan_of(foreign)


def test_time_expected_is_said_after_the_first_batches(tmp_path, capsys):
    model = tiny_model()
    extract(model, find_head(model)[1], plan_of(support=SUPPORT), tmp_path / "store")
    assert re.search(r"[\d,]+ tokens/s, prompts counted: about \d+ seconds more are expected", capsys.readouterr().err)
