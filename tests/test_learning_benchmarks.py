"""What the long tests of learning look at: a fault that they are to find is found."""

import pytest

import learning_soak
from helpers.lessons import edit, rewarded
from learning_lasting import Tenant, slope
from moe_bias.learning.journal import Journal


def event(number, **other):
    return {"number": number, "event": "lesson", "version": number, "applied": True, "published": True, **other}


def tenant(count, unknown=0):
    told = {number: {"event": "lesson", "reply": event(number)} for number in range(1, count + 1)}
    return Tenant("one", told=told, unknown=[{}] * unknown)


def test_a_history_that_is_the_books_has_no_faults():
    assert tenant(3).faults([event(1), event(2), event(3)]) == []
    assert tenant(3, unknown=1).faults([event(number) for number in range(1, 5)]) == []
    assert tenant(3, unknown=2).faults([event(1), event(2), event(3)]) == []


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([event(1), event(2)], "3 was acknowledged and is not"),
        ([event(1), event(2), event(2), event(3)], "counts"),
        ([event(1), event(2), event(3), event(4)], "4 events of 3 told"),
        ([event(1), event(2, published=False), event(3)], "2 is"),
        ([event(1), event(2), event(3, version=2)], "3 is"),
    ],
)
def test_what_was_lost_doubled_or_told_otherwise_is_found(events, fault):
    assert any(fault in sentence for sentence in tenant(3).faults(events))


def test_what_is_written_down_otherwise_is_found(tmp_path):
    journal = Journal(tmp_path / "journal.bin")
    for lesson in (edit(1), rewarded(0.5), edit(2)):
        journal.append("lesson", {"reward": lesson.reward}, lesson.tensors())
    journal.append("undo", {})
    journal.close()
    text = " ".join(map(str, edit(1).features.token[edit(1).features.example == 0].tolist()))
    told = {
        1: {"event": "lesson", "edit": text},
        2: {"event": "lesson", "reward": 0.5},
        3: {"event": "lesson", "edit": "other"},
        4: {"event": "undo"},
    }

    def faults(**changed):
        book = Tenant("one", told={**told, **{int(number): sent for number, sent in changed.items()}})
        return book.faults_in_journal(tmp_path / "journal.bin", lambda ids: " ".join(map(str, ids)))

    (only,) = faults()
    assert "3 is" in only
    assert any("2 is" in fault for fault in faults(**{"2": {"event": "lesson", "reward": 0.25}}))
    assert any("4 is" in fault for fault in faults(**{"4": {"event": "freeze"}}))


def test_a_slope_is_that_of_the_late_part():
    memory = [{"at": 60.0 * minute, "one": 2**20 * (100 + 3 * max(minute, 4))} for minute in range(12)]
    assert slope(memory, "one")["slope"] == pytest.approx(3)


def test_a_soak_in_which_a_process_is_killed_ends_with_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning_soak, "KILL_EVERY", 60)
    monkeypatch.setattr(learning_soak, "EVENTS", ("undo",))
    soak = learning_soak.Soak(tmp_path, 2, learning_soak.config(20_000))
    for _ in range(150):
        soak.tell()
    soak.finish()
    assert soak.counts["killed"] > 0
    assert soak.from_journals() == 2
    assert soak.from_the_first(2) == 2
    learned = soak.tenants[0].book
    learned[0] = (learned[0] + 1) % 8
    assert soak.from_the_first(1) == 0
