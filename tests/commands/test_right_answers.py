"""`moe-bias train sft --samples`: right samples of an evaluation, with their prompts, problems held out whole."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers.calls import counted
from helpers.complaints import complaint
from helpers.evaluations import SAMPLED, lines, words_to, write
from helpers.saved import save_adapter
from helpers.training_processes import ADAPTER
from moe_bias.api.data import Texts
from moe_bias.cli import main
from moe_bias.commands.right_answers import RightAnswers
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


def sample(problem, number, text, outcome="correct", arm="base", finished=True):
    return Sample(problem, arm, number, outcome, "1", 3, finished, text)


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
    found = RightAnswers.of(Path("measured"), "adapter")
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
    found = RightAnswers.of(Path("measured"), None)
    assert found.texts.conversations[:2] == [sampled("w5 w6", "w9 w20"), sampled("w5 w6", "w40")]
    assert found.texts.units == [n for n in range(18) for _ in range(2)]
    assert RightAnswers.of(Path("measured"), "adapter").texts.conversations == [
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
        **{"problems_answered": 18, "sampled": 77, "cut": 1},
    }
    assert Path("out", ADAPTER).exists()
    assert main(["report", "out", "--output", "page"]) == 0


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
            "'measured/samples.jsonl' has no samples of 'mine'; name one with --samples-of: 'adapter', 'base'",
        ),
        (
            "--samples measured --samples-of adapter",
            "the right answers of 'adapter' in measured has 1 problems with right answers; at least 3 are needed, one",
        ),
        ("--samples old", "--samples 'old' has no problems.jsonl: it was measured before prompts were kept; give its"),
        (
            "--samples rl",
            "--samples 'rl' is not the folder of a finished moe-bias eval, which alone keeps every sample",
        ),
        ("--samples nowhere", "--samples 'nowhere' is not the folder of a finished moe-bias eval, which alone keeps"),
        ("--samples m --data d", "--data d and --samples m exclude each other; give one (data comes from --data, sam"),
        ("--samples m --store s", "--store s and --samples m exclude each other; give one"),
        ("", "one of --data, --store and --samples is required"),
        ("--data d --samples-of base", "--samples-of base needs --samples; give both (samples_of comes from --samp"),
        ("--samples m --split test", "--split test does not apply to --samples; leave it out"),
    ],
)
def test_what_cannot_be_trained_on_is_told_in_one_sentence(folder, more, sentence, capsys):
    wrong = [sample("p1", n, "w1", "wrong") for n in range(3)]
    measured([*wrong, sample("p2", 0, "w9", finished=False), sample("p2", 0, "w9", arm="adapter")])
    for name, record in (("old", {"problems": {}, "protocol": {}}), ("rl", {"accuracy": {}, "right": {}})):
        Path(name).mkdir()
        Path(name, "record.json").write_text(json.dumps(record))
        Path(name, "samples.jsonl").write_text('{"step": 1, "question": "w5", "completion": "8"}\n')
    assert complaint(capsys, *COMMON.split(), "--output", "out", *more.split()).startswith(sentence)
    assert not Path("out").exists()


def test_a_number_of_samples_in_the_settings_file_is_that_of_eval(folder):
    Path("moe-bias.toml").write_text("[eval]\nsamples = 4")
    assert main(train_words("out", source=("--data", "rows.jsonl"))) == 0
    assert record_of("out")["settings"]["samples"] is None
