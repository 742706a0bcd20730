"""What killed processes leave on the disk: named so that one sees what it is, and removed by the next run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.models import tiny_model
from helpers.stores import die, die_at, in_child
from moe_bias import records
from moe_bias.adapter import save_layer
from moe_bias.adapter.saved import refuse_overwriting
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig
from moe_bias.mistakes import UserError
from moe_bias.records import remove_left_overs, temporary_folder, unfinished, write_json, write_whole
from moe_bias.training import checkpoint
from moe_bias.training.checkpoint import Checkpoints, Position, saved_layers

NAME = re.compile(r"\.record\.json\.moe-bias-unfinished-\w+-\d+")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_by(process: int, machine: str = "", name: str = "record.json", kind: str = "unfinished") -> str:
    return f".{name}.moe-bias-{kind}-{machine or records.machine_name()}-{process}"


def a_dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@forks
def test_a_killed_write_leaves_what_the_next_one_removes(tmp_path):
    write_json(tmp_path / "other.json", {})

    def killed():
        Path.replace = lambda *args: die()
        write_json(tmp_path / "record.json", {"half": True})

    assert in_child(killed) == signal.SIGKILL
    left, other = names(tmp_path)
    assert NAME.fullmatch(left)
    assert other == "other.json"
    write_json(tmp_path / "other.json", {"any": "file of the folder"})
    assert names(tmp_path) == ["other.json"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "record.json", b"half")

    def half_a_folder():
        with unfinished(tmp_path / "folder") as beside:
            beside.mkdir()
            (beside / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_folder()
    assert names(tmp_path) == []


def test_what_a_living_process_or_the_user_owns_stays(tmp_path):
    dead = a_dead_process()
    stays = [
        left_by(os.getppid()),
        left_by(os.getpid(), name="something else of this process"),
        left_by(dead, machine="elsewhere"),
        f".record.json.{dead}",
        ".record.json.moe-bias-unfinished-",
        f".record.json.moe-bias-unfinished-{records.machine_name()}-mine",
        f"record.json.moe-bias-unfinished-{records.machine_name()}-{dead}",
        "record.json",
        "tmpabcd",
    ]
    for name in [*stays, left_by(dead), left_by(10**30)]:
        (tmp_path / name).write_text("")
    (tmp_path / left_by(dead, name="folder")).mkdir()
    (tmp_path / left_by(dead, name="folder") / "file").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    (tmp_path / left_by(dead, name="link")).symlink_to(elsewhere)
    remove_left_overs(tmp_path)
    assert names(tmp_path) == sorted([*stays, "elsewhere"])
    assert names(elsewhere) == ["precious"]


def test_what_is_a_day_old_goes_whatever_machine_it_is_of(tmp_path):
    """But for temporary folders: a process that reads one for days is not known to have ended."""
    young, used = left_by(6, "elsewhere"), left_by(5, "elsewhere", kind="temporary")
    left = ((25, left_by(5, "elsewhere")), (23, young), (99, used), (25, left_by(os.getpid())))
    for hours, name in (*left, (99, left_by(os.getppid()))):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    remove_left_overs(tmp_path)
    assert names(tmp_path) == sorted([young, used, left_by(os.getppid())])


def test_processes_of_a_container_are_not_taken_for_those_outside(monkeypatch):
    outside = records.machine_name.__wrapped__()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[4026532999]")
    inside = records.machine_name.__wrapped__()
    assert inside.endswith("pid_4026532999_")
    assert inside != outside


def test_folders_of_one_process_do_not_remove_each_other(tmp_path):
    with temporary_folder("first", tmp_path) as first, temporary_folder("second", tmp_path) as second:
        write_whole(tmp_path / "file", b"")
        assert first.is_dir()
        assert second.is_dir()
    assert names(tmp_path) == ["file"]


@forks
def test_the_folder_of_features_that_are_not_kept_goes_with_the_next_run(tmp_path):
    def killed():
        with temporary_folder("features", tmp_path) as folder:
            (folder / "shard").write_text("much")
            die()

    assert in_child(killed) == signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with temporary_folder("features", tmp_path) as folder:
        assert names(tmp_path) == [folder.name]


@forks
def test_saving_an_adapter_killed_at_any_step_ends_with_the_same_files(tmp_path):
    model = tiny_model()
    layer = find_head(model)[1].layer(LayerConfig(support=(3, 5)))
    save_layer(layer, tmp_path / "whole", model)

    def killed_at(step, folder):
        die_at(step, (Path, "replace"), (Path, "mkdir"), (records.shutil, "rmtree"))
        save_layer(layer, folder, model)

    step, status = 0, signal.SIGKILL
    while status == signal.SIGKILL:
        step += 1
        folder = tmp_path / str(step)
        status = in_child(lambda step=step, folder=folder: killed_at(step, folder))
        try:
            refuse_overwriting(folder)
        except UserError:
            pass
        else:
            save_layer(layer, folder, model)
        assert names(folder) == names(tmp_path / "whole")
    assert status == 0
    assert step > 4


# --- checkpoints ----------------------------------------------------------------------------------


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save({"layer.experts": torch.full((2, 3), float(step))}, Position(step))


@forks
def test_a_checkpoint_beyond_the_number_to_keep_goes_when_the_run_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    for step in (1, 2):
        save(checkpoints, step)

    def killed():
        checkpoint.remove_left_overs = lambda folder: die()
        save(checkpoints, 3)

    assert in_child(killed) == signal.SIGKILL
    (checkpoints.folder / left_by(a_dead_process(), name="step-00000004.safetensors")).write_text("half")
    mine = checkpoints.folder / "step-best.safetensors"
    save_file({"layer.experts": torch.zeros(1)}, mine)
    assert len(names(checkpoints.folder)) == 5
    tensors, position = checkpoints.load(Position)
    assert names(checkpoints.folder) == ["step-00000002.safetensors", "step-00000003.safetensors", mine.name]
    assert position == Position(3)
    assert tensors["layer.experts"].tolist() == [[3.0] * 3] * 2
    assert [step for step, _ in saved_layers(tmp_path)] == [2, 3]


def rewrite(path: Path, **metadata: str) -> None:
    """Other numbers under the header as it was, but for what is given."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        before = file.metadata()
    tensors["layer.experts"][0, 0] += 1 if not metadata else 0
    save_file(tensors, path, metadata=before | metadata)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (rewrite, "its checksum does not fit"),
        (lambda path: rewrite(path, position='{"step": 7}'), "its checksum does not fit"),
        (lambda path: rewrite(path, position='{"step": "7"}'), "it does not say where the run stands"),
        (lambda path: rewrite(path, position="[]"), "it does not say where the run stands"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), ""),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: (path.unlink(), os.mkfifo(path)), "it is no file"),
        (lambda path: (path.unlink(), path.mkdir()), "it is no file"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "'position'"),
    ],
)
def test_a_run_does_not_go_on_from_a_damaged_checkpoint(tmp_path, damage, reason):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    damage(checkpoints.latest())
    for use in (lambda: checkpoints.load(Position), lambda: list(saved_layers(tmp_path))):
        with pytest.raises(
            UserError, match=rf"checkpoint '.*step-00000002.safetensors' is damaged \(.*{reason}.*remove"
        ):
            use()


def test_a_checkpoint_of_before_there_were_checksums_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    checkpoints.folder.mkdir()
    position = json.dumps({"step": 5, "last_nll": None, "best_nll": None, "best_step": 0, "worse": 0})
    save_file({"a": torch.ones(2)}, checkpoints.folder / "step-00000005.safetensors", metadata={"position": position})
    assert checkpoints.load(Position)[1] == Position(5)
