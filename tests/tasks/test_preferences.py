"""Rows of preferences: text, messages, whole chats, and what cannot be told."""

import json

import pytest

from helpers.models import word_tokenizer
from moe_bias.mistakes import UserError
from moe_bias.tasks.preferences import encode_preferences, preferences, read_preferences


def turn(role, content):
    return {"role": role, "content": content}


USER, GOOD, BAD = turn("user", "w3"), turn("assistant", "w4 w5"), turn("assistant", "w6")
ROWS = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "w3", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "w3", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": "w4 w5", "rejected": "w6"},
]


@pytest.mark.parametrize("row", ROWS)
def test_a_chat_is_read_however_it_is_written(row):
    (found,) = preferences([row])
    assert found.chosen.turns == found.rejected.turns == (USER,)
    assert (found.chosen.completion, found.rejected.completion) == ("w4 w5", "w6")
    assert found.chosen.is_chat
    assert found.chosen.reply is None


def test_text_goes_on_from_text():
    (found,) = preferences([{"prompt": "w3", "chosen": "w4", "rejected": "w5", "score": 1}])
    assert not found.chosen.is_chat
    assert (found.chosen.turns[0]["content"], found.chosen.completion, found.rejected.completion) == ("w3", "w4", "w5")


def test_a_system_turn_of_its_own_column_and_a_longer_chat():
    (found,) = preferences([{"system": "w9", **ROWS[3]}])
    assert [message["role"] for message in found.chosen.turns] == ["system", "user"]
    chat = [USER, GOOD, USER]
    (found,) = preferences([{"chosen": [*chat, GOOD], "rejected": [*chat, BAD]}])
    assert list(found.rejected.turns) == chat


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("text", "row 1 of the rows is not an object with columns"),
        ({"prompt": "a", "chosen": "b"}, "a preference needs rejected"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "a preference needs chosen"),
        ({"chosen": "b", "rejected": "c"}, "no turn in common that would be their prompt; give a prompt"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen: the answer is empty"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is neither text nor a list of messages but 3"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "rejected is not text"),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "after the prompt chosen has turns of"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [turn("assistant", "")]}, "rejected: the answer is empty"),
        ({**ROWS[0], "tools": [{"name": "f"}]}, "has tools, which"),
    ],
)
def test_what_cannot_be_told_is_refused_by_its_row(row, sentence):
    with pytest.raises(UserError, match=sentence):
        preferences([row])


def test_both_answers_are_examples_side_by_side_and_a_pair_without_room_goes_whole(tmp_path):
    rows = [
        {"prompt": f"w{n} " * length, "chosen": "w4 w5", "rejected": "w6"} for n, length in ((7, 1), (8, 9), (9, 2))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = encode_preferences(read_preferences(str(path)), word_tokenizer(), max_length=6)
    assert corpus.rows == [0, 1, 4, 5]
    assert [one.completion_ids for one in corpus.examples] == [[4, 5, 2], [6, 2]] * 2
    assert corpus.left_out == 2
