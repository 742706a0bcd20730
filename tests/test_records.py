import json

import pytest

from moe_bias.records import provenance, write_json


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


def test_provenance_names_versions_and_machine():
    found = provenance()
    assert set(found["versions"]) == {"moe-bias", "torch", "transformers", "peft"}
    assert found["machine"]["processor"]
    json.dumps(found)
