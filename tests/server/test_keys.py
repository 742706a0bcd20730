import json

import pytest

from moe_bias.mistakes import UserError
from moe_bias.server.keys import Keys

ALICE, BOTH, ANY = "alice-secret-0123", "both-secret-45678", "any-secret-9abcdef"


def read(tmp_path, content):
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Keys.read(path)


def test_a_key_is_for_its_adapters_alone(tmp_path):
    keys = read(tmp_path, {ALICE: "alice", BOTH: ["bob", "alice"], ANY: "*"})
    assert keys.names == ["alice", "bob"]
    assert keys.allow(f"Bearer {ALICE}", "alice")
    assert not keys.allow(f"Bearer {ALICE}", "bob")
    assert keys.allow(f"bearer {BOTH}", "bob")
    assert keys.allow(f"Bearer {ANY}", "carol")
    for wrong in (None, "", "Bearer", f"Basic {ALICE}", "Bearer alice-secret-012", f"Bearer {ALICE}x", ALICE):
        assert not keys.allow(wrong, "alice")


def test_without_keys_everyone_may():
    assert Keys().allow(None, "any")
    assert not Keys().are_needed
    assert Keys().names == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "keys"),
        ([], "holds no keys"),
        ({}, "holds no keys"),
        ({ALICE: 3}, "key 1 .* is for 3"),
        ({ALICE: "a", BOTH: []}, "key 2 .* is for"),
        ({"short": "alice"}, "key 1 .* has 5 characters"),
    ],
)
def test_a_damaged_file_is_refused_without_showing_a_key(tmp_path, content, sentence):
    with pytest.raises(UserError, match=sentence) as told:
        read(tmp_path, content)
    assert ALICE not in str(told.value)
    assert "short" not in str(told.value)
