import json
import re

import pytest
from transformers import AutoTokenizer

from helpers.saved import save_model
from moe_bias.mistakes import UserError
from moe_bias.tasks.conversations import encode
from moe_bias.tasks.labels import Asking, LabelledText, label_tokens, labels_of, read_labelled


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))


def asking(*labels: str, template: str = "{text} w4 {labels}", is_chat: bool = False) -> Asking:
    return Asking(template, labels, is_chat)


def test_a_prompt_lists_the_labels_and_the_answer_begins_with_a_space():
    found = asking("w7", "w8").conversation("w5 {labels}", "w8")
    assert found.turns[0]["content"] == "w5 {labels} w4 w7, w8"
    assert found.completion == " w8"


@pytest.mark.parametrize(("template", "is_chat"), [("{labels} {text}\n", False), ("{labels} {text}", True)])
def test_after_white_space_and_in_a_chat_it_does_not(template, is_chat):
    assert asking("w7", template=template, is_chat=is_chat).conversation("w5", "w7").completion == "w7"


def test_a_label_is_the_first_token_of_its_answer(tokenizer):
    one = asking("w7 w9", "w8 w9")
    assert label_tokens(one, tokenizer, 64) == [7, 8]
    example = encode(one.conversation("w5", "w8 w9"), tokenizer, 64)
    assert example is not None
    assert example.completion_ids[0] == 8


def test_labels_that_begin_alike_are_refused_by_name(tokenizer):
    with pytest.raises(UserError, match=r"labels 'w7 w9' and 'w7 w8' both begin with the token 'w7'.*give labels"):
        label_tokens(asking("w7 w9", "w6", "w7 w8"), tokenizer, 64)


def test_a_prompt_without_room_is_refused(tokenizer):
    with pytest.raises(UserError, match="fills 2 tokens; raise `max_length`"):
        label_tokens(asking("w7", "w8"), tokenizer, 2)


def test_rows_of_a_file_or_in_memory(tmp_path):
    rows = [{"text": "w5", "label": " w7 "}, {"text": "w6", "label": "w8"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_labelled(str(path), "train", "text", "label")
    assert found == ([LabelledText("w5", "w7"), LabelledText("w6", "w8")], str(path))
    assert read_labelled(rows, "train", "text", "label")[0] == found[0]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "w5"}], "row 1 of the rows has no column 'label'; name the one to take with `label_column`"),
        ([{"text": 5, "label": "w7"}], "text in row 1 of the rows is not text but 5"),
        ([{"text": "w5", "label": 1}], "label in row 1 of the rows is not text but 1"),
        (["w5"], "row 1 of the rows is 'w5'; give an object"),
        ([{"text": "w5", "label": "w7"}, {"text": "w5", "label": "w8"}], "the rows has the text 'w5' 2 times"),
    ],
)
def test_rows_that_cannot_be_used(rows, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_labelled(rows, "train", "text", "label")


def test_there_is_something_to_choose_among():
    assert labels_of([LabelledText("a", "y"), LabelledText("b", "x")], "rows") == ("x", "y")
    with pytest.raises(UserError, match="one label, 'x'"):
        labels_of([LabelledText("a", "x")], "rows")
    with pytest.raises(UserError, match="empty label"):
        labels_of([LabelledText("a", "x"), LabelledText("b", "")], "rows")
