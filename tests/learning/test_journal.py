import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bias.learning.journal import STATE, Journal, beginning, entries, write_state
from moe_bias.mistakes import UserError


def test_entries_come_back_in_order_with_their_tensors(tmp_path):
    journal = Journal(tmp_path / "deeper" / "journal.bin")
    tensor = torch.arange(6.0).view(2, 3)
    assert journal.append("lesson", {"reward": 0.5}, {"hidden": tensor.T}) == 1
    assert journal.append("undo", {}) == 2
    first, second = entries(journal.path)
    assert (first.number, first.event, first.header) == (1, "lesson", {"reward": 0.5})
    assert torch.equal(first.tensors["hidden"], tensor.T)
    assert (second.number, second.event, second.tensors) == (2, "undo", {})
    assert [entry.number for entry in entries(journal.path, first.end)] == [2]


@settings(max_examples=60)
@given(cut=st.integers(1, 400))
def test_half_an_entry_at_the_end_goes_and_nothing_else(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("journal") / "journal.bin"
    journal = Journal(path)
    ends = [0]
    for number in range(4):
        journal.append("lesson", {"reward": number}, {"hidden": torch.full((5,), float(number))})
        ends.append(journal.size)
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    left = sum(end <= max(len(whole) - cut, 0) for end in ends) - 1
    assert [entry.number for entry in entries(path)] == list(range(1, left + 1))
    again = Journal(path)
    assert (again.last, again.size) == (left, ends[left])
    assert again.append("undo", {}) == left + 1
    assert [entry.event for entry in entries(path)] == ["lesson"] * left + ["undo"]


def test_a_damaged_entry_before_the_last_is_told_of(tmp_path):
    journal = Journal(tmp_path / "journal.bin")
    for _ in range(3):
        journal.append("lesson", {}, {"hidden": torch.ones(4)})
    journal.close()
    content = bytearray(journal.path.read_bytes())
    content[40] ^= 1
    journal.path.write_bytes(content)
    with pytest.raises(UserError, match="damaged at byte 0"):
        list(entries(journal.path))
    with pytest.raises(UserError, match="damaged at byte 0"):
        Journal(journal.path)


def test_a_state_takes_the_journals_place_and_numbers_go_on(tmp_path):
    journal = Journal(tmp_path / "journal.bin")
    for _ in range(3):
        journal.append("lesson", {}, {"hidden": torch.ones(400)})
    before = journal.size
    write_state(tmp_path / "state.bin", 3, {"version": 2}, {"x": torch.zeros(1)})
    journal.begin_anew(tmp_path / "state.bin", 3)
    assert journal.size < before
    assert journal.grown == 0
    assert journal.append("undo", {}) == 4
    journal_grown = journal.grown
    assert journal_grown > 0
    assert [(entry.number, entry.event) for entry in entries(journal.path)] == [(3, STATE), (4, "undo")]
    journal.close()
    again = Journal(journal.path)
    assert (again.last, again.grown) == (4, journal_grown)


def test_what_came_after_a_state_stays_after_it(tmp_path):
    journal = Journal(tmp_path / "journal.bin")
    for number in range(1, 6):
        journal.append("lesson", {}, {"hidden": torch.full((400,), float(number))})
    write_state(tmp_path / "state.bin", 3, {}, {})
    old = entries(journal.path)
    begins, read = beginning(journal.path), next(old)
    journal.begin_anew(tmp_path / "state.bin", 3)
    assert [entry.number for entry in old] == [2, 3, 4, 5]  # whoever was reading reads on
    assert [entry.number for entry in entries(journal.path, read.end, begins)] == [3, 4, 5]
    assert journal.append("undo", {}) == 6
    write_state(tmp_path / "state.bin", 5, {}, {})  # a later state than the one that the cut was asked for
    journal.begin_anew(tmp_path / "state.bin", 4)
    found = list(entries(journal.path))
    assert [(entry.number, entry.event) for entry in found] == [(5, STATE), (5, "lesson"), (6, "undo")]
    assert float(found[1].tensors["hidden"][0]) == 5
    journal.begin_anew(tmp_path / "state.bin", 5)
    assert [entry.number for entry in entries(journal.path)] == [5, 6]
    journal.close()
    assert Journal(journal.path).append("undo", {}) == 7


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.bin")
    journal.append("lesson", {}, {"hidden": torch.ones(4)})
    size = journal.size

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fdatasync", full)
    with pytest.raises(OSError, match="No space"):
        journal.append("lesson", {}, {"hidden": torch.ones(4)})
    monkeypatch.undo()
    assert (journal.size, journal.last, journal.path.stat().st_size) == (size, 1, size)
    assert journal.append("undo", {}) == 2
