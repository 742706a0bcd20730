import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_bias.config import UserError
from moe_bias.tasks.conversations import (
    Conversation,
    ask,
    encode,
    encode_all,
    encode_prompt,
    end_of_turn,
    ends,
    prompt_text,
    read_conversations,
)

TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)
WORDS = ["<unk>", "<turn>", "<end>", "<eos>", "user", "assistant", "system", "how", "many", "two", "three", "so"]


@pytest.fixture
def tokenizer():
    word_level = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<eos>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    fast.chat_template = TEMPLATE
    return fast


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def write_rows(path, *rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_chat_is_encoded_as_the_model_will_see_it_and_ends_with_the_end_of_turn(tokenizer):
    example = encode(ask("how many", "so two"), tokenizer, 100)
    assert example.prompt_ids == ids("<turn> user how many <end> <turn> assistant")
    assert example.completion_ids == ids("so two <end>")


def test_plain_text_ends_with_eos(tokenizer):
    conversation = Conversation(({"role": "user", "content": "how many"},), "two", is_chat=False)
    example = encode(conversation, tokenizer, 100)
    assert (example.prompt_ids, example.completion_ids) == (ids("how many"), ids("two <eos>"))


def test_too_long_is_cut_and_a_prompt_without_room_gives_none(tokenizer):
    prompt_length = len(encode_prompt(ask("how many"), tokenizer))
    assert encode(ask("how many", "so two"), tokenizer, prompt_length + 1).completion_ids == ids("so")
    assert encode(ask("how many", "so two"), tokenizer, prompt_length) is None


def test_without_a_prompt_the_first_token_stands_for_one(tokenizer):
    def plain(completion):
        return Conversation(({"role": "user", "content": ""},), completion, is_chat=False)

    example = encode(plain("how many"), tokenizer, 100)
    assert (example.prompt_ids, example.completion_ids) == (ids("how"), ids("many <eos>"))
    tokenizer.eos_token = None
    assert encode(plain("how"), tokenizer, 100) is None


def test_all_rows_are_counted(tokenizer):
    room = len(encode_prompt(ask("how many"), tokenizer)) + 2
    conversations = [
        ask("how many", "two"),
        ask("how many two three", "so"),
        ask("how many", "so two"),
        ask("how", "so"),
    ]
    corpus = encode_all(conversations, tokenizer, room)
    assert corpus.rows == [0, 2, 3]
    assert [len(example.completion_ids) for example in corpus.examples] == [2, 2, 2]
    assert [example.is_cut for example in corpus.examples] == [False, True, False]
    assert (corpus.left_out, corpus.cut) == (1, 1)


def test_chat_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        prompt_text(ask("how many"), tokenizer)


def test_end_of_turn_is_eos_where_the_template_adds_no_special_token(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert end_of_turn(ask("how many"), tokenizer) == ids("<eos>")


def test_ends_are_those_of_an_answer_and_of_a_text(tokenizer):
    assert ends(tokenizer) == sorted(ids("<end> <eos>"))
    tokenizer.chat_template = None
    assert ends(tokenizer) == ids("<eos>")


TWO = ({"role": "user", "content": "how many"},)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*TWO, {"role": "assistant", "content": "two"}]}, Conversation(TWO, "two")),
        ({"prompt": "how many", "completion": "two"}, Conversation(TWO, "two", is_chat=False)),
        (
            {"prompt": list(TWO), "completion": [{"role": "assistant", "content": "two"}]},
            Conversation(TWO, "two"),
        ),
        ({"question": "how many", "answer": "two"}, ask("how many", "two")),
        ({"problem": "how many", "solution": "two", "answer": "2"}, ask("how many", "two")),
        ({"instruction": "how", "input": "many", "output": "two"}, ask("how\n\nmany", "two")),
        ({"instruction": "how many", "input": "", "output": "two"}, ask("how many", "two")),
    ],
)
def test_usual_columns(tmp_path, row, expected):
    assert read_conversations(write_rows(tmp_path / "rows.jsonl", row), "train") == [expected]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no rows"),
        ("{not json", "line 1 of .* is not JSON"),
        ('{"text": "two"}', r"row 1 of .* has columns \['text'\]; needed are messages, or one of prompt/completion"),
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": " "}', "row 2 of .* empty completion"),
        ('{"messages": [{"role": "user", "content": "how"}]}', "needed are messages"),
        ("[1, 2]", "row 1 of .* is not an object"),
        ('{"prompt": "a", "completion": 3}', "row 1 of .*: its completion is not text but 3"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_conversations(str(path), "train")


def test_a_row_may_hold_any_unicode_line_separator(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one\u2028two\x85three", "answer": "two"}\r\n', encoding="utf-8")
    assert read_conversations(str(path), "train") == [ask("one\u2028two\x85three", "two")]


def test_a_file_that_is_not_utf8_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(UserError, match=r"rows\.jsonl is not UTF-8 text"):
        read_conversations(str(path), "train")


def test_missing_file_and_undelivered_data_set(tmp_path):
    with pytest.raises(UserError, match=r"missing\.jsonl is not a file"):
        read_conversations(str(tmp_path / "missing.jsonl"), "train")
    with pytest.raises(UserError, match="'nobody/nothing' is neither a file nor a data set that the Hub delivered"):
        read_conversations("nobody/nothing", "train")
