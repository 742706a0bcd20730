"""Learning from feedback in Python: the server's learner, to the same bytes, and one sentence on a bad row."""

import json
from pathlib import Path

import pandas
import pytest
import torch

import moe_bias as mb
from helpers.saved import save_model
from moe_bias.adapter.saved import load_layer
from moe_bias.api import learning
from moe_bias.api.learning import ARGUMENT
from moe_bias.learning.service import Learning
from moe_bias.mistakes import UserError
from moe_bias.server.answer import Given
from moe_bias.server.engine import Engine

SAID = [{"role": "user", "content": "w5 w6 w7"}]
CONFIG = mb.LearnConfig(expert_rate=0.05)
ROWS = [
    {"prompt": "w5 w6", "answer": "w7 w8", "edit": "w9 w8 w4"},
    {"messages": SAID, "answer": "w7 w8", "prefer": "w60 w61 w62"},
    {"prompt": "w5", "answer": "w7 w9", "reward": -0.5},
    {"messages": SAID, "answer": "w7 w8", "reward": 1},
    {"prompt": "w9 w6", "answer": "w7 w8", "edit": "w9 w8 w4", "reward": None},
    {"prompt": "w9 w6", "answer": "w7 w8", "edit": "w9 w8 w4"},
    {"prompt": "w3 w6", "answer": "w7", "edit": "w9 w8 w70"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return mb.load(save_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def layer(base):
    torch.manual_seed(0)
    layer = base.head.layer(mb.LayerConfig(support=tuple(range(2, 40)), num_experts=3, top_k=2))
    layer.calibrate(torch.randn(50, base.head.hidden_size))
    return layer


def parameters(layer):
    return {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}


def refused(*arguments):
    """The sentence that the caller reads."""
    with pytest.raises(UserError) as caught:
        mb.learn(*arguments)
    return str(caught.value)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_what_a_server_learns_to_the_same_bytes(base, layer, tmp_path):
    mb.save(layer, tmp_path / "given" / "mine", base)
    found, report = mb.learn(base, ROWS, layer, CONFIG)
    served = Learning(tmp_path / "learned", tmp_path / "given", base.head, CONFIG)
    try:
        for number, row in enumerate(learning._Reader(base, CONFIG, True).all(ROWS)):
            version = load_layer(served.adapters / "mine", base.head)
            outcome = served.teach("mine", row.lesson(base, version, CONFIG)).result(120)
            lesson = report.lessons[number]
            assert [outcome[name] for name in ("number", "applied", "published", "reason", "loss_after")] == [
                lesson[name] for name in ("feedback", "applied", "published", "reason", "loss_after")
            ]
            assert (outcome["step_kl"], outcome["base_kl"]) == (lesson["kl_step"], lesson["kl_base"])
        last = load_layer(served.adapters / "mine", base.head)
    finally:
        served.close()
    assert last.config.support == found.config.support
    assert {70, 60} <= {*found.config.support}
    assert same(parameters(last), parameters(found))


def test_its_features_are_the_servers(base, layer, tmp_path):
    mb.save(layer, tmp_path / "mine", base)
    (row,) = learning._Reader(base, CONFIG, True).all(ROWS[:1])
    engine = Engine(base, tmp_path)
    try:
        (better,), (other,) = (engine.features_of(row.prompt, [Given(one)], "mine") for one in (row.better, row.answer))
    finally:
        engine.close()
    features = row.lesson(base, layer, CONFIG).features
    expected = torch.cat([better.hidden, other.hidden])
    assert torch.allclose(features.hidden, expected, atol=1e-5)
    assert torch.allclose(features.log_partition, torch.cat([better.log_partition, other.log_partition]), atol=1e-5)
    assert torch.equal(features.token, torch.cat([better.token, other.token]))


def test_the_layer_that_is_given_stays_and_the_report_tells_of_each_row(base, layer, capsys):
    before = parameters(layer)
    found, report = mb.learn(base, ROWS, layer, CONFIG)
    assert same(parameters(layer), before)
    assert not same(parameters(found), before)
    assert [one["kind"] for one in report.numbers()] == ["edit", "prefer", "reward", "reward", "edit", "edit", "edit"]
    assert [one["reason"] == "kept to measure by" for one in report.lessons] == [False, False, True] * 2 + [False]
    assert all((one["kl_step"] is None) == (not one["applied"]) for one in report.lessons)
    assert report.lessons[-1]["version"] == sum(one["published"] for one in report.lessons)
    assert str(report).startswith("5 of 7 rows of feedback were learned from; the layer changed ")
    assert "kept to measure by" in str(report)
    assert "<table>" in report._repr_html_()
    assert list(report.frame()["feedback"]) == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_wanted_is_answered_then(base, layer):
    row = {"prompt": "w5 w6 w7", "answer": "w1", "edit": "w8 w5 w9"}
    found, _ = mb.learn(base, [row] * 12, layer, mb.LearnConfig(expert_rate=0.05, held_out_every=100))
    assert mb.generate(base, "w5 w6 w7", layer, max_new_tokens=8) != "w8 w5 w9"
    assert mb.generate(base, "w5 w6 w7", found, max_new_tokens=8) == "w8 w5 w9"


def test_rows_are_a_file_or_a_data_frame_too(base, layer, tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = parameters(mb.learn(base, ROWS, layer, CONFIG)[0])
    for rows in (path, str(path), pandas.DataFrame(ROWS)):
        assert same(parameters(mb.learn(base, rows, layer, CONFIG)[0]), expected)


def test_a_prompt_may_be_a_text_to_be_continued(base, layer):
    asked, plain = (learning._Reader(base, CONFIG, chat).all(ROWS[:1])[0] for chat in (True, False))
    assert plain.prompt == base.tokenizer("w5 w6", add_special_tokens=False).input_ids
    assert len(asked.prompt) > len(plain.prompt)
    assert mb.learn(base, ROWS[:1], layer, CONFIG, chat=False)[1].lessons[0]["published"]


def test_threads_are_as_they_were(base, layer):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mb.learn(base, ROWS[:1], layer, CONFIG)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


LONG = " ".join(["w8"] * 200)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("w5", f"row 2 of {ARGUMENT} is not an object with columns but 'w5'"),
        ({"prompt": "w5", "answer": "w6"}, "has none of edit, reward and prefer; give one of them"),
        ({**ROWS[0], "reward": 1}, "has edit and reward of edit, reward and prefer; give one of them"),
        ({"answer": "w6", "reward": 1}, "has neither prompt nor messages; give one of the two"),
        ({**ROWS[0], "messages": SAID}, "has prompt and messages; give one of the two"),
        ({"prompt": "w5", "reward": 1}, "has no answer; give its text"),
        ({"prompt": "w5", "answer": " \n", "reward": 1}, "answer is empty; give its text"),
        ({"prompt": "w5", "answer": 3, "reward": 1}, "answer is not text but 3"),
        ({"prompt": 5, "answer": "w6", "reward": 1}, "prompt is not text but 5"),
        ({"prompt": "w5", "answer": "w6", "reward": 2}, f"row 2 of {ARGUMENT}: `reward` is 2; give a number from -1"),
        ({"prompt": "w5", "answer": "w6", "reward": True}, "`reward` is True; give a number from -1 to 1"),
        ({"prompt": "w5", "answer": "w6", "edit": "w6"}, "is the answer itself, token for token"),
        ({"prompt": "w5", "answer": "w6", "prefer": LONG}, "tokens, and the model reads 128; leave the row out"),
        ({"messages": [], "answer": "w6", "reward": 1}, "messages is not a list of messages but []"),
        ({"messages": "w5", "answer": "w6", "reward": 1}, "messages is not a list of messages but 'w5'"),
        ({"messages": [{"role": "user"}], "answer": "w6", "reward": 1}, "messages, message 1: content is not text"),
        (
            {"messages": [*SAID, {"role": "assistant", "content": "w6"}], "answer": "w6", "reward": 1},
            "ends with a turn of the assistant; give it as answer",
        ),
    ],
)
def test_a_bad_row_is_told_of_before_anything_is_learned(base, layer, monkeypatch, row, sentence):
    monkeypatch.setattr(learning, "extended", None)
    found = refused(base, [ROWS[0], row], layer)
    assert sentence in found
    assert f"row 2 of {ARGUMENT}" in found


def test_other_mistakes(base, layer, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert refused("model", ROWS).startswith("`base` is 'model', no frozen model")
    assert refused(base, [], layer) == f"{ARGUMENT} is empty; give at least one row"
    assert refused(base, ROWS[0], layer).startswith(f"{ARGUMENT} are a mapping with")
    assert refused(base, tmp_path / "empty.jsonl", layer).endswith("has no rows")
    assert refused(base, ROWS, "mine").startswith("`layer` is 'mine', a name")
    assert refused(base, ROWS, layer, {"passes": 2}) == "`config` is a dict; give moe_bias.LearnConfig(...)"
    assert refused(base, [{**ROWS[0], "edit": "w7 w8 w9"}], layer, mb.LearnConfig(lesson_tokens=1)) == (
        f"row 1 of {ARGUMENT}: the answers are the same in their first 2 tokens, and 1 of an answer are learned from; "
        "raise `lesson_tokens`"
    )
    assert not Path("learned").exists()
