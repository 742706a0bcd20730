"""Checkpoints, going on where a run stopped, killed processes, Ctrl-C, and runs that are not the same."""

import json
import os
import random
import signal
import time

import pytest
import torch

from conftest import randomise
from moe_bias.config import Interrupted, UserError
from moe_bias.training import checkpoint, trainer
from moe_bias.training.checkpoint import Checkpoints, Position
from moe_bias.training.interrupt import deferred_interrupt
from moe_bias.training.sft import train
from test_trainer import lines_of, run_settings
from test_training import features_of, head_of, layer_of
from training_processes import ADAPTER, run_training, start_training

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
    assert checkpoints.load() is None
    assert checkpoints.where() == "from the beginning"
    for step in range(1, 5):
        checkpoints.save({"a": torch.full((2,), float(step))}, Position(step, 1.5, 1.0, 2, 1))
    assert names(tmp_path / "checkpoints") == ["step-00000003.safetensors", "step-00000004.safetensors"]
    tensors, position = checkpoints.load()
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
        with pytest.raises(UserError, match="No space left on device.*make room.*goes on from .*step-00000001"):
            checkpoints.save({"a": torch.ones(1)}, Position(2))
    assert checkpoints.load()[1] == Position(1)
    checkpoints.save({"a": torch.ones(1)}, Position(3))
    assert names(tmp_path / "checkpoints") == ["step-00000003.safetensors"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    checkpoints.save({"a": torch.zeros(1)}, Position(1))
    path = checkpoints.latest()
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="step-00000001.safetensors' is damaged; remove it"):
        checkpoints.load()


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


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.0005)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(tmp_path, seed, undisturbed):
    draw, kills, steps = random.Random(seed), 0, 0
    for _ in range(6):
        process = start_training(tmp_path, CHOICES)
        steps = min(steps + draw.randrange(5, 60), 235)
        wait_for(lambda: steps_done(tmp_path) > steps, process)  # noqa: B023
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


def test_a_run_that_ran_out_of_patience_stays_so(tmp_path, monkeypatch):
    head = head_of()
    features, nlls = features_of(head), [3.0, 1.0, 2.0, 2.0, 2.0]
    ends = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "cut", 6)):
        layer, said = layer_of(), iter(nlls)
        monkeypatch.setattr(trainer, "mean_nll", lambda *arguments: next(said))  # noqa: B023
        settings = run_settings(folder, epochs=9, evaluate_every=2, patience=2, checkpoint_every=2)
        if stop is not None:
            real = trainer.Trainer._out_of_patience
            monkeypatch.setattr(trainer.Trainer, "_out_of_patience", lambda self: (_ for _ in ()).throw(OSError) if self._position.step == 6 else real(self))  # noqa: B023, E501
            with pytest.raises(OSError):
                train(layer_of(), features, features, head, settings)
            monkeypatch.setattr(trainer.Trainer, "_out_of_patience", real)
        report = train(layer, features, features, head, settings)
        ends.append((report, layer.experts.detach().clone()))
    assert ends[0][0].steps == ends[1][0].steps == 6
    assert torch.equal(ends[0][1], ends[1][1])


def test_ctrl_c_keeps_the_step_that_was_running_and_says_how_to_go_on(tmp_path, monkeypatch):
    head, layer = head_of(), layer_of()
    features = features_of(head)
    real, calls = trainer.supervised_gradients, []

    def pressed_in_the_fifth(*arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(trainer, "supervised_gradients", pressed_in_the_fifth)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="run the same command again to go on from .*step-00000005.safetensors"):
            train(layer, features, features, head, run_settings(tmp_path, checkpoint_every=100))
    finally:
        signal.signal(signal.SIGINT, before)
    report = train(layer_of(), features, features, head, run_settings(tmp_path, checkpoint_every=100))
    assert report.steps == 12
    assert len(calls) == 12


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


def unfinished(folder):
    """A folder with a run that was stopped after its first checkpoint; returns head and features."""
    head = head_of()
    features = features_of(head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_check", lambda self, *rest: self._position.step < 2 or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(layer_of(), features, features, head, run_settings(folder))
    return head, features


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"expert_rate": 0.01}, "--expert-rate 0.05, not 0.01"),
        ({"seed": 4, "epochs": 5}, "--epochs 3, not 5"),
        ({"entropy_gate": False}, "--entropy-gate True, not False"),
    ],
)
def test_other_settings_are_refused_by_the_first_that_differs(tmp_path, changes, difference):
    head, features = unfinished(tmp_path)
    with pytest.raises(UserError, match=f"holds an unfinished run with {difference}; give its settings"):
        train(layer_of(), features, features, head, run_settings(tmp_path, **changes))


def test_other_tokens_are_refused(tmp_path):
    head, features = unfinished(tmp_path)
    with pytest.raises(UserError, match="holds an unfinished run with other training tokens"):
        train(layer_of(), features.at(slice(0, 60)), features, head, run_settings(tmp_path))


def test_how_often_checkpoints_are_written_may_change(tmp_path):
    head, features = unfinished(tmp_path)
    report = train(layer_of(), features, features, head, run_settings(tmp_path, checkpoint_every=5, keep_checkpoints=3))
    assert report.steps == 12
    assert names(tmp_path / "checkpoints") == [f"step-{step:08d}.safetensors" for step in (2, 5, 10)]


def test_a_damaged_run_file_is_named(tmp_path):
    head, features = unfinished(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(UserError, match="run.json' is damaged"):
        train(layer_of(), features, features, head, run_settings(tmp_path))


def test_the_best_layer_survives_a_kill(tmp_path):
    """The best layer is not the last one: what was remembered before the kill must come back with the checkpoint."""
    head = head_of()
    features, layers = features_of(head), []
    randomise(layer_of())
    for folder, stop in ((tmp_path / "whole", False), (tmp_path / "cut", True)):
        layer, said = layer_of(), iter([3.0, 1.0, *[2.0] * 20])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "mean_nll", lambda *arguments: next(said))  # noqa: B023
            settings = run_settings(folder, evaluate_every=2, patience=100)
            if stop:
                real = trainer.Trainer._check
                patch.setattr(trainer.Trainer, "_check", lambda self, *rest: self._position.step < 7 or 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    train(layer_of(), features, features, head, settings)
                patch.setattr(trainer.Trainer, "_check", real)
            report = train(layer, features, features, head, settings)
        assert report.layer_step == 2
        layers.append(layer.experts.detach().clone())
    assert torch.equal(*layers)


def test_one_run_in_this_process_is_the_one_in_another(tmp_path, undisturbed):
    run_training(tmp_path, CHOICES)
    assert (tmp_path / ADAPTER).read_bytes() == undisturbed[0]
