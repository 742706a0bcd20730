"""Checkpoints, going on where a run stopped, killed processes, Ctrl-C, and runs that are not the same."""

import json
import os
import random
import signal
import time

import pytest
import torch

from helpers.training import features_of, head_of, layer_of, lines_of, run_settings
from helpers.training_processes import ADAPTER, run_training, start_training, train_in
from moe_bias.interrupts import deferred_interrupt
from moe_bias.mistakes import UserError
from moe_bias.training import checkpoint, trainer
from moe_bias.training.checkpoint import Checkpoints, Position
from moe_bias.training.objectives import Supervised

CHOICES = {
    "epochs": 60,
    "batch_tokens": 16,
    "evaluate_every": 7,
    "patience": 1000,
    "expert_dropout": 0.2,
    "weight_decay": 0.01,
    "checkpoint_every": 3,
}
"""240 steps with everything that has a state."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_hold_what_was_saved_and_only_the_last_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    assert checkpoints.load(Position) is None
    assert checkpoints.where() == "from the beginning"
    for step in range(1, 5):
        checkpoints.save({"a": torch.full((2,), float(step))}, Position(step, 1.5, 1.0, 2, 1))
    assert names(tmp_path / "checkpoints") == ["step-00000003.safetensors", "step-00000004.safetensors"]
    tensors, position = checkpoints.load(Position)
    assert torch.equal(tensors["a"], torch.tensor([4.0, 4.0]))
    assert position == Position(4, 1.5, 1.0, 2, 1)


def test_a_checkpoint_that_fails_leaves_the_ones_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    checkpoints.save({"a": torch.zeros(1)}, Position(1))

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match=r"No space left on device.*make room.*goes on from .*step-00000001"):
            checkpoints.save({"a": torch.ones(1)}, Position(2))
    assert checkpoints.load(Position)[1] == Position(1)
    checkpoints.save({"a": torch.ones(1)}, Position(3))
    assert names(tmp_path / "checkpoints") == ["step-00000003.safetensors"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    checkpoints.save({"a": torch.zeros(1)}, Position(1))
    path = checkpoints.latest()
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"step-00000001\.safetensors' is damaged \(.*\); remove it"):
        checkpoints.load(Position)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The adapter's bytes, and the metrics, of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start_training(folder, CHOICES)
    process.join(60)
    assert process.exitcode == 0
    return (folder / ADAPTER).read_bytes(), [without_speed(line) for line in lines_of(folder)]


def without_speed(line):
    return {name: value for name, value in line.items() if name != "tokens_per_second"}


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for_step(folder, step, process, seconds=60):
    end = time.monotonic() + seconds
    while steps_done(folder) <= step and process.is_alive() and time.monotonic() < end:
        time.sleep(0.0005)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(tmp_path, seed, undisturbed):
    draw, kills, steps = random.Random(seed), 0, 0
    for _ in range(6):
        process = start_training(tmp_path, CHOICES)
        steps = min(steps + draw.randrange(5, 50), 200)
        wait_for_step(tmp_path, steps, process)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 4
    assert not (tmp_path / ADAPTER).exists()
    process = start_training(tmp_path, CHOICES)
    process.join(60)
    assert process.exitcode == 0
    adapter, metrics = undisturbed
    assert (tmp_path / ADAPTER).read_bytes() == adapter
    assert [without_speed(line) for line in lines_of(tmp_path)] == metrics


class StopsAfter:
    """A callback that breaks a run off once so many steps are taken."""

    def __init__(self, steps):
        self.steps = steps

    def on_step(self, step, metrics, layer):
        assert step < self.steps, "stopped"


def stopped_run(folder, after, **changes):
    """Trains until `after` steps are taken; returns head and features."""
    head = head_of()
    features = features_of(head)
    with pytest.raises(AssertionError, match="stopped"):
        train_in(layer_of(), features, features, head, run_settings(folder, **changes), callbacks=[StopsAfter(after)])
    return head, features


def with_nlls(patch, nlls):
    """Evaluations say these values instead of measuring."""
    said = iter(nlls)
    patch.setattr(trainer, "mean_nll", lambda *arguments: next(said))


def test_a_run_that_ran_out_of_patience_stays_so(tmp_path, monkeypatch):
    with_nlls(monkeypatch, [3.0, 1.0, 2.0, 2.0])
    changes = {"epochs": 9, "evaluate_every": 2, "patience": 2}
    head, features = stopped_run(tmp_path, 6, **changes)
    report = train_in(layer_of(), features, features, head, run_settings(tmp_path, **changes))
    assert (report.steps, report.layer_step, report.held_out_nll) == (6, 2, 1.0)


def test_the_best_layer_survives_a_kill(tmp_path, monkeypatch):
    """The best layer is not the last one: what was remembered before the kill comes back with the checkpoint."""
    head, layers, changes = head_of(), [], {"evaluate_every": 2, "patience": 100}
    features = features_of(head)
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        with_nlls(monkeypatch, [3.0, 1.0, *[2.0] * 20])
        if folder.name == "cut":
            stopped_run(folder, 7, **changes)
        layers.append(layer_of())
        assert train_in(layers[-1], features, features, head, run_settings(folder, **changes)).layer_step == 2
    assert torch.equal(layers[0].experts, layers[1].experts)


class Pressing(Supervised):
    """Ctrl-C in the fifth step; the first call of a run is the trial before it."""

    calls = 0

    def __call__(self, now, then):
        Pressing.calls += 1
        if Pressing.calls == 1 + 5:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(now, then)


def test_ctrl_c_keeps_the_step_that_was_running(tmp_path):
    head, layer, settings = head_of(), layer_of(), run_settings(tmp_path, checkpoint_every=100)
    features = features_of(head)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_in(layer, features, features, head, settings, objective=Pressing())
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path / "checkpoints") == ["step-00000005.safetensors"]
    report = train_in(layer_of(), features, features, head, settings, objective=Pressing())
    assert report.steps == 12
    assert Pressing.calls == 12 + 2


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with deferred_interrupt() as pressed:
            assert not pressed()
            signal.raise_signal(signal.SIGINT)
            assert pressed()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_of_the_program_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt() as pressed:
            signal.raise_signal(signal.SIGINT)
            assert not pressed()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"expert_rate": 0.01}, "`expert_rate` None, not 0.01"),
        ({"seed": 4, "epochs": 5}, "`seed` 0, not 4"),
        ({"entropy_gate": False}, "`entropy_gate` True, not False"),
    ],
)
def test_other_settings_are_refused_by_the_first_that_differs(tmp_path, changes, difference):
    head, features = stopped_run(tmp_path, 2)
    with pytest.raises(UserError, match=f"holds an unfinished run with {difference}; give its settings"):
        train_in(layer_of(), features, features, head, run_settings(tmp_path, **changes))


def test_other_tokens_are_refused(tmp_path):
    head, features = stopped_run(tmp_path, 2)
    with pytest.raises(UserError, match="holds an unfinished run with other training tokens"):
        train_in(layer_of(), features.at(slice(0, 60)), features, head, run_settings(tmp_path))


def test_how_often_checkpoints_are_written_may_change(tmp_path):
    head, features = stopped_run(tmp_path, 2)
    report = train_in(
        layer_of(), features, features, head, run_settings(tmp_path, checkpoint_every=5, keep_checkpoints=3)
    )
    assert report.steps == 12
    assert names(tmp_path / "checkpoints") == [f"step-{step:08d}.safetensors" for step in (2, 5, 10)]


def test_a_damaged_run_file_is_named(tmp_path):
    head, features = stopped_run(tmp_path, 2)
    (tmp_path / "run.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(UserError, match=r"run\.json' is damaged"):
        train_in(layer_of(), features, features, head, run_settings(tmp_path))


def test_one_run_in_this_process_is_the_one_in_another(tmp_path, undisturbed):
    run_training(tmp_path, CHOICES)
    assert (tmp_path / ADAPTER).read_bytes() == undisturbed[0]
