import errno
import json
import os

import pytest

from moe_bias.records import provenance, whole_folder, write_json, write_whole


def test_written_whole_and_readable(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_json(path, {"b": 1, "a": [1.5, None]})
    assert json.loads(path.read_text()) == {"b": 1, "a": [1.5, None]}
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_disk_that_takes_no_more_leaves_the_old_file_and_no_half(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(FileNotFoundError), whole_folder(target) as beside:
        (beside / "half").rename(beside / "missing" / "half")
    assert list(target.parent.iterdir()) == []
    with whole_folder(target) as beside:
        (beside / "file").write_text("mine")
        assert not target.exists()
    assert (target / "file").read_text() == "mine"


def test_another_process_may_have_made_the_folder_first(tmp_path):
    with whole_folder(tmp_path / "folder") as beside:
        (beside / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("theirs")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").read_text() == "theirs"


def failing(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_provenance_names_versions_and_machine():
    found = provenance()
    assert set(found["versions"]) == {"moe-bias", "torch", "transformers", "peft"}
    assert found["machine"]["processor"]
    json.dumps(found)
