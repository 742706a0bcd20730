"""Learning beside a server, with its real process."""

import asyncio
import os
import shutil
import signal
from concurrent.futures import wait
from threading import Timer

import pytest
import torch
from safetensors.torch import load_file

from helpers import loops
from helpers.lessons import HEAD, InlineWorker, edit, entry, learner, rewarded, save_start
from moe_bias.adapter.saved import WEIGHTS_FILE, load_layer
from moe_bias.config import LearnConfig
from moe_bias.learning import service
from moe_bias.learning.journal import entries
from moe_bias.learning.learner import FREEZE, UNDO
from moe_bias.learning.process import CHECKPOINT, JOURNAL, Learners, Place
from moe_bias.learning.service import Learning, LearningStoppedError
from moe_bias.mistakes import UserError

PATIENCE = 120
CONFIG = LearnConfig(expert_rate=0.1)


def begun(tmp_path, config=CONFIG, **choices):
    given = tmp_path / "given"
    if not given.exists():
        save_start(given)
    return Learning(tmp_path / "learned", given, HEAD, config, **choices)


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(service, "Worker", InlineWorker)


@pytest.fixture
def learning(inline, tmp_path):
    learning = begun(tmp_path)
    yield learning
    learning.close()


def served(learning, name="mine"):
    return load_layer(learning.adapters / name, HEAD)


def bytes_of(learning, name="mine"):
    return (learning.adapters / name / WEIGHTS_FILE).read_bytes()


def same(layer, pupil):
    return all(torch.equal(a, b) for a, b in zip(layer.parameters(), pupil.layer.parameters(), strict=True))


def test_a_lesson_becomes_the_version_that_is_served(learning, tmp_path):
    start = load_file(tmp_path / "given" / "mine" / WEIGHTS_FILE)
    pupil = learner()
    for number in range(1, 3):
        outcome = learning.teach("mine", edit(number)).result(PATIENCE)
        assert outcome["published"]
        assert outcome["number"] == outcome["version"] == number
        assert outcome["milliseconds"] > 0
        pupil.apply(entry(number, edit(number)))
        assert same(served(learning), pupil)
    again = load_file(tmp_path / "given" / "mine" / WEIGHTS_FILE)
    assert all(torch.equal(start[name], again[name]) for name in start)
    assert [told["number"] for told in learning.history("mine")] == [1, 2]


def test_undo_serves_the_version_before(learning):
    learning.teach("mine", edit(1)).result(PATIENCE)
    first = bytes_of(learning)
    learning.teach("mine", edit(2)).result(PATIENCE)
    assert bytes_of(learning) != first
    learning.tell("mine", UNDO).result(PATIENCE)
    assert bytes_of(learning) == first
    learning.tell("mine", UNDO).result(PATIENCE)
    assert "no version" in learning.tell("mine", UNDO).result(PATIENCE)["reason"]


def test_what_is_killed_goes_on_to_the_same_bytes(tmp_path):
    lessons = [rewarded(0.5, seed) if seed % 3 == 0 else edit(seed) for seed in range(12)]
    learning = begun(tmp_path)
    try:
        told = []
        for number, lesson in enumerate(lessons):
            told.append(learning.teach("mine", lesson))
            if number in (3, 7):
                os.kill(learning.process, signal.SIGKILL)
        wait(told, PATIENCE)
        assert [future.result()["number"] for future in told] == list(range(1, 13))
        killed = bytes_of(learning)
        assert same(served(learning), pupil_of(lessons))
        os.kill(learning.process, signal.SIGSTOP)
        waiting = learning.teach("mine", edit(50))
        os.kill(learning.process, signal.SIGKILL)
        assert waiting.result(PATIENCE)["number"] == 13
        assert bytes_of(learning) != killed
    finally:
        learning.close()
    assert same(served(learning), pupil_of([*lessons, edit(50)]))


def pupil_of(lessons):
    pupil = learner()
    for number, lesson in enumerate(lessons, 1):
        pupil.apply(entry(number, lesson))
    return pupil


def test_a_killed_learner_in_the_middle_of_anything_goes_on_to_the_same_bytes(inline, tmp_path):
    lessons = [rewarded(0.5, seed) if seed % 3 == 0 else edit(seed) for seed in range(47)]
    learning = begun(tmp_path)
    worker = InlineWorker.newest
    for number, lesson in enumerate(lessons):
        worker.paused = number % 7 in (2, 3)
        learning.teach("mine", lesson)
        if number % 7 == 4:
            worker.kill()
    assert [told["number"] for told in learning.history("mine")] == list(range(1, 48))
    assert same(served(learning), pupil_of(lessons))


def test_who_waits_is_told_of_what_a_killed_process_wrote_down_and_told_nobody(inline, tmp_path):
    learning = begun(tmp_path)
    worker = InlineWorker.newest
    learning.teach("mine", edit(0)).result(PATIENCE)
    worker.paused = True
    told = [learning.teach("mine", edit(seed)) for seed in range(1, 4)]
    other = Learners(*worker.arguments)  # the process that is killed after its checkpoint
    other.read_on("mine")
    other.checkpoint("mine")
    worker.paused = False
    worker.kill()
    assert [future.result(PATIENCE)["number"] for future in told] == [2, 3, 4]
    assert [outcome["number"] for outcome in learning.history("mine")] == [1, 2, 3, 4]
    learning.close()


def test_who_waits_for_an_outcome_that_nobody_knows_any_more_is_told_so(inline, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_bias.learning.learner.HISTORY", 2)
    learning = begun(tmp_path)
    worker = InlineWorker.newest
    worker.paused = True
    told = [learning.teach("mine", rewarded(0.5, seed)) for seed in range(4)]
    other = Learners(*worker.arguments)
    other.read_on("mine")
    other.checkpoint("mine")
    worker.paused = False
    worker.kill()
    for future in told[:2]:
        with pytest.raises(LearningStoppedError, match="applied once"):
            future.result(PATIENCE)
    assert [future.result(PATIENCE)["number"] for future in told[2:]] == [3, 4]
    learning.close()


def test_who_waits_may_go_and_all_others_are_told(inline, tmp_path):
    learning = begun(tmp_path)
    InlineWorker.newest.paused = True
    gone, waiting = (learning.teach("mine", edit(seed)) for seed in range(2))

    async def leave():
        asyncio.wrap_future(gone).cancel()
        await asyncio.sleep(0)

    loops.run(leave())
    InlineWorker.newest.paused = False
    learning.restarted()
    assert waiting.result(PATIENCE)["number"] == 2
    assert gone.result(PATIENCE)["number"] == 1
    learning.close()


def test_a_history_waits_for_the_process_to_read_what_there_was(inline, tmp_path, monkeypatch):
    learning = begun(tmp_path)
    assert learning.history("mine") == []
    learning.teach("mine", edit(1)).result(PATIENCE)
    told = learning.history("mine")
    InlineWorker.newest.kill()  # so that nothing is written down
    learning.close()
    (tmp_path / "learned" / "journals" / "mine" / CHECKPOINT).unlink()
    monkeypatch.setattr(InlineWorker, "is_slow", True)
    again = begun(tmp_path)
    monkeypatch.setattr(service, "_PATIENCE", 0.01)
    with pytest.raises(LearningStoppedError, match="ask again"):
        again.history("mine")
    monkeypatch.setattr(service, "_PATIENCE", PATIENCE)
    InlineWorker.newest.paused = False
    Timer(0.1, again.restarted).start()
    assert again.history("mine") == told
    again.close()


def test_an_adapter_is_made_again_from_its_journal_alone(inline, tmp_path):
    learning = begun(tmp_path)
    for seed in range(5):
        learning.teach("mine", edit(seed)).result(PATIENCE)
    expected, told = bytes_of(learning), learning.history("mine")
    learning.close()
    folder = tmp_path / "learned" / "journals" / "mine"
    (folder / CHECKPOINT).unlink()
    (tmp_path / "learned" / "adapters" / "mine").unlink()
    for left in (tmp_path / "learned" / "versions" / "mine").glob("*/*"):
        left.unlink()
    for left in (tmp_path / "learned" / "versions" / "mine").iterdir():
        left.rmdir()
    again = begun(tmp_path)
    try:
        assert bytes_of(again) == expected
        assert again.history("mine") == told
    finally:
        again.close()


def test_a_long_journal_is_cut_and_nothing_is_lost(inline, tmp_path):
    config = LearnConfig(expert_rate=0.1, journal_size=20_000, kept_lessons=4)
    learning = begun(tmp_path, config)
    pupil = learner(kept_lessons=4)
    try:
        for number in range(1, 41):
            learning.teach("mine", edit(number)).result(PATIENCE)
            pupil.apply(entry(number, edit(number)))
        path = tmp_path / "learned" / "journals" / "mine" / JOURNAL
        assert next(iter(entries(path))).event == "state"
        learning.teach("mine", edit(41)).result(PATIENCE)
        pupil.apply(entry(41, edit(41)))
        assert same(served(learning), pupil)
        expected = bytes_of(learning)
    finally:
        learning.close()
    again = begun(tmp_path, config)
    try:
        assert len(again.history("mine")) == 41
        assert bytes_of(again) == expected
        for number in (42, 43):
            assert again.teach("mine", edit(number)).result(PATIENCE)["number"] == number
            pupil.apply(entry(number, edit(number)))
        assert same(served(again), pupil)
    finally:
        again.close()


def test_a_server_of_other_settings_says_so_in_the_journal_and_it_is_made_again_from_that(inline, tmp_path):
    other = LearnConfig(expert_rate=0.05, passes=2, rho=0.5, journal_size=30_000)
    for config in (CONFIG, other, CONFIG):
        learning = begun(tmp_path, config)
        for seed in range(3):
            learning.teach("mine", rewarded(0.5, seed) if seed == 1 else edit(seed)).result(PATIENCE)
        expected = bytes_of(learning)
        learning.close()
    folder = tmp_path / "learned" / "journals" / "mine"
    said = {one.number: one.header["config"]["passes"] for one in entries(folder / JOURNAL) if "config" in one.header}
    assert said == {1: 4, 4: 2, 7: 4}
    (folder / CHECKPOINT).unlink()
    shutil.rmtree(tmp_path / "learned" / "versions")
    (tmp_path / "learned" / "adapters" / "mine").unlink()
    again = begun(tmp_path, LearnConfig(passes=7))
    try:
        assert bytes_of(again) == expected
        assert again.changes() == {"mine": ["expert_rate None in place of 0.1", "passes 7 in place of 4"]}
    finally:
        again.close()


def test_settings_of_a_journal_that_was_cut_are_known(inline, tmp_path):
    config = LearnConfig(expert_rate=0.1, journal_size=20_000, kept_lessons=4)
    learning = begun(tmp_path, config)
    for number in range(1, 41):
        learning.teach("mine", edit(number)).result(PATIENCE)
    learning.close()
    again = begun(tmp_path, config)
    assert next(iter(entries(tmp_path / "learned" / "journals" / "mine" / JOURNAL))).event == "state"
    assert again.changes() == {}
    again.close()


def test_a_journal_is_cut_under_feedback_that_never_pauses(inline, tmp_path):
    learning, pupil = begun(tmp_path), learner()
    worker, path = InlineWorker.newest, tmp_path / "learned" / "journals" / "mine" / JOURNAL
    for number in range(1, 6):
        learning.teach("mine", edit(number)).result(PATIENCE)
        pupil.apply(entry(number, edit(number)))
    worker.ask("checkpoint", "mine")
    assert [one.number for one in entries(path)] == [5]
    worker.paused = True
    told = learning.teach("mine", edit(6))
    pupil.apply(entry(6, edit(6)))
    learning.replied(("checkpoint", "mine"), 5, None)  # as of before the sixth was told
    assert [one.number for one in entries(path)] == [5, 6]
    worker.paused = False
    learning.restarted()
    assert told.result(PATIENCE)["number"] == 6
    assert same(served(learning), pupil)
    learning.close()
    again = begun(tmp_path)
    assert len(again.history("mine")) == 6
    assert same(served(again), pupil)
    again.close()


def test_many_adapters_learn_apart_in_little_memory(inline, tmp_path):
    given = tmp_path / "given"
    for number in range(6):
        save_start(given, f"tenant-{number}")
    learning = begun(tmp_path, memory=1)  # all but one are put away each time
    pupils = [learner() for _ in range(6)]
    try:
        for round_ in range(3):
            told = [learning.teach(f"tenant-{number}", edit(10 * number + round_)) for number in range(6)]
            wait(told, PATIENCE)
            for number, pupil in enumerate(pupils):
                pupil.apply(entry(round_ + 1, edit(10 * number + round_)))
        for number, pupil in enumerate(pupils):
            assert same(served(learning, f"tenant-{number}"), pupil)
    finally:
        learning.close()


def test_a_learner_that_fails_is_told_of(learning):
    learning.tell("mine", "sing")
    with pytest.raises(LearningStoppedError, match="'sing'"):
        learning.teach("mine", edit()).result(PATIENCE)


def test_who_waits_when_the_server_stops_is_told_and_nothing_is_lost(inline, tmp_path):
    learning = begun(tmp_path)
    InlineWorker.newest.paused = True
    future = learning.teach("mine", edit())
    learning.close()
    with pytest.raises(LearningStoppedError, match="is kept"):
        future.result()
    again = begun(tmp_path)
    assert again.tell("mine", FREEZE).result()["number"] == 2
    assert [told["published"] for told in again.history("mine")] == [True, False]
    again.close()


def test_a_process_that_ends_again_and_again_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_bias.learning.worker.ENOUGH_FAILURES", 0)
    learning = begun(tmp_path)
    try:
        Place(tmp_path / "learned").head.unlink()
        future = learning.teach("mine", edit())
        with pytest.raises(LearningStoppedError, match="times in a row"):
            future.result(PATIENCE)
        with pytest.raises(LearningStoppedError, match="start the server again"):
            learning.teach("mine", edit())
    finally:
        learning.close()


def test_mistakes_are_sentences(learning, tmp_path):
    with pytest.raises(UserError, match="no adapter 'other'"):
        learning.teach("other", edit())
    with pytest.raises(UserError, match=r"'\.\./up' is no name"):
        learning.begin("../up", tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        Learning(tmp_path / "learned", tmp_path / "nowhere", HEAD, CONFIG)
