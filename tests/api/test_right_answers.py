"""`moe-bias train sft --samples`, `right_answers`: right samples, their very prompts, problems held out whole."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import moe_bias as mb
from helpers.calls import counted
from helpers.complaints import complaint
from helpers.evaluations import SAMPLED, lines, words_to, write
from helpers.saved import save_adapter
from helpers.training_processes import ADAPTER
from moe_bias.api.data import Texts
from moe_bias.api.right_answers import Asked, RightAnswers
from moe_bias.cli import main
from moe_bias.evaluation import answering
from moe_bias.evaluation.samples import Sample, SampleFile, write_prompts
from moe_bias.features import build
from moe_bias.tasks.conversations import ask, encode
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.data import Data

LONGER = ["--temperature", "4", "--max-new-tokens", "30"]
"""So that some answers end by themselves."""
COMMON = "train sft --model model --device cpu --support auto:40 --batch-tokens 8 --epochs 2"


@pytest.fixture
def folder(prepared_folder):
    return prepared_folder


def train_words(output, *more, source=("--samples", "measured")):
    return [*COMMON.split(), *source, "--output", str(output), *more]


def sample(problem, number, text, outcome="correct", arm="base", finished=True, tokens=3):
    return Sample(problem, arm, number, outcome, "1", tokens, finished, text)


def measured(samples, problems=20, chat=True):
    """The folder of an evaluation that has these samples, as `eval` leaves it."""
    SampleFile(Path("measured"), 1).append(samples)
    write_prompts(Path("measured"), {f"p{n}": f"w{5 + n} w6" for n in range(problems)})
    named = {"name": "words", "count": problems, "digest": "d"}
    Path("measured/record.json").write_text(json.dumps({"problems": named, "protocol": {"chat": chat}, "arms": []}))


def answers_to(problem):
    """Two right answers to a problem, the first one twice, and a wrong one."""
    words = [f"w{9 + problem % 3} w{20 + problem % 5}", f"w{40 + problem}"]
    texts = [words[0], "w1", words[0], words[1]]
    return [sample(f"p{problem}", n, text, "wrong" if text == "w1" else "correct") for n, text in enumerate(texts)]


def sampled(question, answer):
    return replace(ask(question, answer), is_sampled=True)


def record_of(output):
    return json.loads(Path(output, "record.json").read_text())


@pytest.mark.parametrize(
    ("asked", "chat"), [([], True), (["--no-chat"], False), (["--prompt-template", "w7 {question} w8"], True)]
)
def test_answers_are_learned_after_the_very_prompts_that_they_were_sampled_from(
    folder, grader, monkeypatch, asked, chat
):
    write(folder / "problems.jsonl", [{"id": f"p{n}", "problem": f"w{5 + n} w6", "answer": str(n)} for n in range(5)])
    save_adapter(folder / "adapter", "model", experts="free")
    seen, tokenizer = {}, AutoTokenizer.from_pretrained("model")
    answer = answering.sampled_answers

    def kept(model, head, prompts, *more):
        found = answer(model, head, prompts, *more)
        for prompt, (_, adapted) in zip(prompts, found, strict=True):
            texts = [tokenizer.decode(sampled.token_ids) for sampled in adapted if sampled.finished]
            seen[tuple(prompt)] = [tokenizer(text, split_special_tokens=True).input_ids for text in texts]
        return found

    monkeypatch.setattr(answering, "sampled_answers", kept)
    assert main(words_to("measured", *SAMPLED, "--samples", "8", *LONGER, "--adapter", "adapter", *asked)) == 0
    said = [{**line, "outcome": "correct"} for line in lines(Path("measured"))]
    Path("measured/samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    found = RightAnswers.of_folder(Path("measured"), "adapter")
    examples = [encode(conversation, tokenizer, 100) for conversation in found.texts.conversations]
    learned = {(tuple(example.prompt_ids), tuple(example.completion_ids)) for example in examples}
    expected = {(prompt, (*ids, 2)) for prompt, texts in seen.items() for ids in texts}
    assert learned == expected
    assert len(examples) == len(expected) > 0
    assert found.sampled == 5 * 8
    assert found.cut == 5 * 8 - sum(map(len, seen.values()))
    assert all(conversation.is_chat == chat for conversation in found.texts.conversations)


def test_the_right_answers_of_each_problem_are_taken_once(folder, capsys):
    cut = sample("p19", 0, "w50", finished=False)
    wrong = [sample("p18", n, "w1", "unparseable") for n in range(4)]
    others = [sample("p18", 0, "w60", arm="adapter"), sample("p3", 0, "w61", arm="adapter")]
    measured([*(each for n in range(17, -1, -1) for each in answers_to(n)), *wrong, cut, *others])
    found = RightAnswers.of_folder(Path("measured"), "base")
    assert found.texts.conversations[:2] == [sampled("w5 w6", "w9 w20"), sampled("w5 w6", "w40")]
    assert found.texts.units == [n for n in range(18) for _ in range(2)]
    assert RightAnswers.of_folder(Path("measured"), "adapter").texts.conversations == [
        sampled("w8 w6", "w61"),
        sampled("w23 w6", "w60"),
    ]
    assert main(train_words("out", "--held-out", "0.2")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "36 different right answers to 18 of 20 problems of words, among 77 samples of 'base' in measured, without 1 "
        "more that the token limit cut; measure the adapter on other problems"
    ) in said
    assert record_of("out")["samples"] == {
        **{"arm": "base", "problems": {"name": "words", "count": 20, "digest": "d"}, "answers": 36},
        **{"problems_answered": 18, "sampled": 77, "cut": 1, "take": "all", "tokens": {"taken": 3.0, "right": 3.0}},
    }
    assert Path("out", ADAPTER).exists()
    assert main(["report", "out", "--output", "page"]) == 0


def lengths_of(*tokens, problem="p0", **more):
    """Right answers of these lengths, whose texts say in which order they were sampled."""
    return [sample(problem, n, f"w{10 + n}", tokens=length, **more) for n, length in enumerate(tokens)]


@pytest.mark.parametrize(
    ("tokens", "shortest", "shorter"),
    [
        ((9, 4, 7), [1], [1, 2]),  # the median is 7
        ((9, 4, 7, 6), [1], [1, 3]),  # it lies between 6 and 7
        ((5, 5, 8), [0], [0, 1]),  # the first of the equally short ones
        ((6,), [0], [0]),
    ],
)
def test_which_right_answers_are_taken_by_hand(folder, tokens, shortest, shorter):
    wrong = sample("p0", 90, "w1", "wrong", tokens=1)
    cut = sample("p0", 91, "w2", finished=False, tokens=2)
    again = sample("p0", 92, "w10", tokens=tokens[0])
    others = [each for n in (1, 2, 3) for each in lengths_of(8, problem=f"p{n}")]
    measured([wrong, cut, *reversed(lengths_of(*tokens)), again, *others])
    for take, kept in (("all", range(len(tokens))), ("shortest", shortest), ("shorter", shorter)):
        found = RightAnswers.of_folder(Path("measured"), "base", take)
        texts = zip(found.texts.conversations, found.texts.units, strict=True)
        own = [text.completion for text, unit in texts if unit == 0]
        assert own == [f"w{10 + n}" for n in kept]
        taken = [tokens[n] for n in kept]
        expected = ((sum(taken) / len(taken) + 24) / 4, (sum(tokens) / len(tokens) + 24) / 4)
        assert found.tokens == pytest.approx(expected)
        assert found.record()["tokens"] == {"taken": found.tokens[0], "right": found.tokens[1]}
        assert (found.sampled, found.cut) == (len(tokens) + 6, 1)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_the_shortest_is_among_the_shorter_which_are_half_or_more(tokens):
    asked = Asked("w", {"name": "words", "count": 1}, {"p0": "w5"}, True)
    taken = {
        take: {
            text.completion for text in RightAnswers.of(asked, lengths_of(*tokens), "base", take).texts.conversations
        }
        for take in ("all", "shorter", "shortest")
    }
    assert len(taken["all"]) == len(tokens)
    assert len(taken["shortest"]) == 1
    assert taken["shortest"] <= taken["shorter"] <= taken["all"]
    assert 2 * len(taken["shorter"]) >= len(tokens)


def test_the_shortest_are_learned_by_the_command_and_by_python_alike(folder, capsys):
    measured([each for n in range(18) for each in lengths_of(9, 4 + n % 3, 7, problem=f"p{n}")])
    assert main(train_words("out", "--samples-take", "shortest")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "18 right answers, the shortest of each problem, to 18 of 20 problems of words, among 54 samples" in said
    assert "they have 5 tokens on average, all right answers 7; measure the adapter on other problems" in said
    assert record_of("out")["samples"]["take"] == record_of("out")["settings"]["samples_take"] == "shortest"
    base = mb.load("model", device="cpu")
    answers = mb.right_answers("measured", samples_take="shortest")
    data = mb.extract(base, answers, support="auto:40")
    config = mb.SFTConfig(support="auto:40", batch_tokens=8, epochs=2)
    mb.train_sft(base, data, config, output="python")
    assert Path("python", ADAPTER).read_bytes() == Path("out", ADAPTER).read_bytes()
    assert main(train_words("all")) == 0
    assert Path("all", ADAPTER).read_bytes() != Path("out", ADAPTER).read_bytes()


def test_right_answers_come_of_an_evaluation_in_memory_as_of_its_folder(folder, grader):
    write(folder / "problems.jsonl", [{"id": f"p{n}", "problem": f"w{5 + n} w6", "answer": str(n)} for n in range(5)])
    base = mb.load("model", device="cpu")
    config = {"samples": 8, "temperature": 4, "max_new_tokens": 30, "batch_size": 6}
    found = mb.evaluate(base, {"base": None}, None, mb.EvalConfig(data="problems.jsonl", **config))
    assert main(words_to("measured", "--samples", "8", *LONGER)) == 0
    kept = [replace(each, outcome="correct") for each in found.samples]
    Path("measured/samples.jsonl").unlink()
    SampleFile(Path("measured"), 1).append(kept)
    for take in ("all", "shorter", "shortest"):
        of_memory = mb.right_answers(replace(found, samples=kept), samples_take=take)
        of_folder = mb.right_answers("measured", samples_take=take)
        assert of_memory.texts.conversations == of_folder.texts.conversations
        assert of_memory.texts.units == of_folder.texts.units
        assert of_memory.tokens == of_folder.tokens


def test_answers_of_a_model_that_was_told_more_are_learned_after_that(folder):
    measured(lengths_of(9, 4, arm="instructed"))
    record = json.loads(Path("measured/record.json").read_text())
    record["arms"] = [{"name": "base", "instruction": ""}, {"name": "instructed", "instruction": "w7"}]
    Path("measured/record.json").write_text(json.dumps(record))
    found = mb.right_answers("measured", samples_of="instructed", samples_take="shortest")
    assert found.texts.conversations == [sampled("w5 w6\n\nw7", "w11")]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: mb.right_answers("measured", samples_take="short"),
            "`samples_take` is 'short'; give one of 'all', 'sh",
        ),
        (lambda: mb.right_answers(["w1"]), "`samples` is a list; give what evaluate returned, or the folder of a moe"),
        (
            lambda: mb.right_answers("measured", samples_take="shortest"),
            "`samples_take` 'shortest' needs to know how long answers are, which the server that 'measured' was",
        ),
        (
            lambda: mb.extract(mb.load("model", device="cpu"), mb.right_answers("measured"), pairs=True),
            "`pairs` needs rows of preferences, and `rows` are right answers",
        ),
    ],
)
def test_what_python_gives_wrong_is_told(folder, call, sentence):
    measured(lengths_of(None, None))
    with pytest.raises(mb.UserError, match=re.escape(sentence)):
        call()


def test_one_answer_a_problem_trains_what_its_rows_would_and_finds_their_hidden_states(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template += "{% if add_generation_prompt %}w3 {% endif %}"  # else a row's answer begins with w3
    tokenizer.save_pretrained("model")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    measured([sample(f"p{n}", 0, row["answer"]) for n, row in enumerate(rows)], problems=30)
    assert main(train_words("data", source=("--data", "rows.jsonl"))) == 0
    passes = counted(monkeypatch, build, "completion_hidden")
    assert main(train_words("samples")) == 0
    assert passes == []
    assert Path("samples", ADAPTER).read_bytes() == Path("data", ADAPTER).read_bytes()
    assert record_of("samples")["adapted_nll"] == record_of("data")["adapted_nll"]


def test_an_unfinished_run_goes_on_to_the_same_bytes(folder, monkeypatch, capsys):
    measured([each for n in range(18) for each in answers_to(n)])
    every = ("--checkpoint-every", "1")
    assert main(train_words("whole", *every)) == 0
    save = Checkpoints.save

    def stop_after_saving(self, tensors, position):
        save(self, tensors, position)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop_after_saving)
        assert main(train_words("cut", *every)) == 130
    assert main(train_words("cut", *every, source=("--data", "rows.jsonl"))) == 2
    capsys.readouterr()
    assert main(train_words("cut", *every)) == 0
    assert Path("cut", ADAPTER).read_bytes() == Path("whole", ADAPTER).read_bytes()


def test_a_problem_is_held_out_with_all_its_answers():
    units = [n // 3 for n in range(30)]
    texts = Texts([ask("w5", "w6")] * 30, "some", units)
    held_out = texts.held_out([row for row in range(30) if row % 7], 0.4, 0)
    assert len({units[row] for row in held_out}) == 4
    assert all((units[row] in {units[held] for held in held_out}) == (row in held_out) for row in range(30) if row % 7)
    alone = Texts(texts.conversations, "some", range(30))
    assert len(alone.held_out(range(30), 0.4, 0)) == 12


def test_held_out_sums_are_those_of_problems():
    material = Data(None, None, None, [1, 2, 5, 7], [], held_out_units=[4, 4, 9, 6])
    assert material.by_unit(np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [3.0, 4.0, 3.0]
    assert Data(None, None, None, [1], []).by_unit(np.array([1.0])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "--samples measured",
            "nothing to train on: 0 different right answers to 0 of 20 problems of words, among 4 samples of 'base' in "
            "measured, without 1 more that the token limit cut; sample more of each problem, or name another row with",
        ),
        (
            "--samples measured --samples-of mine",
            "'measured' has no samples of 'mine'; name one with --samples-of: 'adapter', 'base'",
        ),
        (
            "--samples measured --samples-of adapter",
            "the right answers of 'adapter' in measured has 1 problems with right answers; at least 3 are needed, one",
        ),
        (
            "--samples old",
            "--samples 'old' has no problems.jsonl: it was measured before prompts were kept; evaluating",
        ),
        (
            "--samples rl",
            "--samples 'rl' is not the folder of a finished moe-bias eval, which alone keeps every sample",
        ),
        ("--samples nowhere", "--samples 'nowhere' is not the folder of a finished moe-bias eval, which alone keeps"),
        ("--samples m --data d", "--data d and --samples m exclude each other; give one (data comes from --data, sam"),
        ("--samples m --store s", "--store s and --samples m exclude each other; give one"),
        ("", "one of --data, --store and --samples is required"),
        ("--data d --samples-of base", "--samples-of base needs --samples; give both (samples_of comes from --samp"),
        ("--data d --samples-take shortest", "--samples-take shortest needs --samples; give both (samples_take comes"),
        ("--samples m --split test", "--split test does not apply to --samples; leave it out"),
    ],
)
def test_what_cannot_be_trained_on_is_told_in_one_sentence(folder, more, sentence, capsys):
    wrong = [sample("p1", n, "w1", "wrong") for n in range(3)]
    measured([*wrong, sample("p2", 0, "w9", finished=False), sample("p2", 0, "w9", arm="adapter")])
    for name, record in (("old", {"problems": {}, "protocol": {}, "arms": []}), ("rl", {"accuracy": {}, "right": {}})):
        Path(name).mkdir()
        Path(name, "record.json").write_text(json.dumps(record))
        Path(name, "samples.jsonl").write_text('{"step": 1, "question": "w5", "completion": "8"}\n')
    assert complaint(capsys, *COMMON.split(), "--output", "out", *more.split()).startswith(sentence)
    assert not Path("out").exists()


def test_a_number_of_samples_in_the_settings_file_is_that_of_eval(folder):
    Path("moe-bias.toml").write_text("[eval]\nsamples = 4")
    assert main(train_words("out", source=("--data", "rows.jsonl"))) == 0
    assert record_of("out")["settings"]["samples"] is None
