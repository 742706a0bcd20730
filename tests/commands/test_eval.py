"""`moe-bias eval` on a tiny model: cut short and gone on with, graded again, other methods' adapters, refusals."""

import json
import re
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import GenerationConfig

from helpers.complaints import complaint
from helpers.evaluations import COMMON, SAMPLED, generated, lines, words_to, write
from helpers.models import tiny_model
from helpers.saved import save_adapter, save_model
from moe_bias import MoEBiasConfig, find_adapter_head
from moe_bias.cli import main
from moe_bias.commands import eval_model
from moe_bias.evaluation import answering
from moe_bias.evaluation.ledger import Ledger
from moe_bias.evaluation.samples import Sample, SampleFile
from moe_bias.mistakes import UserError
from moe_bias.rollout.decoding import TextAnswer
from moe_bias.tasks.benchmarks import BENCHMARKS, ProblemSet
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.mathematics import MathematicsTask
from moe_bias.tasks.rows import read_rows
from moe_bias.tasks.task import Problem

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def ground(folder, model, grader):
    rows = [
        {"id": f"p{n}", "problem": f"w{5 + n} w6", "answer": str(n), "level": n % 2, "subject": "words"}
        for n in range(5)
    ]
    write(folder / "problems.jsonl", rows)
    save_adapter(folder / "adapter", "model")
    return folder


def save_lora(folder: Path, targets=("q_proj",)):
    torch.manual_seed(3)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=list(targets), init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.mul_(3)
    adapted.save_pretrained(folder)


def test_every_arm_answers_as_generate_does(ground, capsys):
    save_lora(ground / "lora")
    save_lora(ground / "at-head", targets=("q_proj", "lm_head"))
    assert main(words_to("out", "--adapter", "adapter,lora,at-head", "--prompt-template", "{question} w9")) == 0
    said = {(line["arm"], line["problem"]): line["text"] for line in lines(Path("out"))}
    answers: dict[str, list[str]] = {}
    for arm in ("base", "adapter", "lora", "at-head"):
        model = tiny_model("llama")
        under = model if arm == "base" else PeftModel.from_pretrained(model, arm).eval()
        for n in range(5):
            ids = generated(under, [3, 5 + n, 6, 9])
            answers.setdefault(arm, []).append(" ".join(f"w{token}" for token in ids))
        assert [said[arm, f"p{n}"] for n in range(5)] == answers[arm], arm
    assert len({tuple(texts) for texts in answers.values()}) == 4
    record = json.loads(Path("out/record.json").read_text())
    assert [arm["method"] for arm in record["arms"]] == [None, "MOE_BIAS", "LORA", "LORA"]
    assert [arm["strength"] for arm in record["arms"]] == [None] * 4
    # rank 8 at two layers: 8 (16 + 16) each; at the head 8 (16 + 97) more.
    assert [arm["parameters"] for arm in record["arms"]] == [None, 3 * (5 + 16) + 2, 512, 512 + 904]
    assert record["protocol"]["prompt_template"] == "{question} w9"
    printed = capsys.readouterr().out
    assert "problems.jsonl: 5 problems" in printed
    assert "greedy answers, at most 6 tokens" in printed
    assert "Samples right by level" in printed
    assert "Change of accuracy to each arm before" in printed
    assert "How the answers are written" in printed


def test_an_answer_ends_at_every_end_that_the_model_names(ground):
    assert main(words_to("out", "--prompt-template", "{question}")) == 0
    texts = {line["problem"]: line["text"].split() for line in lines(Path("out"))}
    ends = [2, int(texts["p0"][1][1:])]
    GenerationConfig(eos_token_id=ends).save_pretrained("model")
    assert main(words_to("again", "--prompt-template", "{question}")) == 0
    found = {line["problem"]: line for line in lines(Path("again"))}
    for problem, words in texts.items():
        cut = [number for number, word in enumerate(words) if word == f"w{ends[1]}"]
        assert found[problem]["text"].split() == words[: cut[0]] if cut else words
        assert found[problem]["finished"] == bool(cut) or len(words) < 6
    assert found["p0"]["finished"]
    assert len(found["p0"]["text"].split()) < 2


def test_an_adapter_is_measured_at_each_strength_beside_one_base(ground):
    assert (
        main(words_to("out", "--adapter", "adapter", "--strength", "0,0.4,1", "--prompt-template", "{question}")) == 0
    )
    said = {(line["arm"], line["problem"]): line["text"] for line in lines(Path("out"))}
    assert len(said) == 4 * 5
    under = PeftModel.from_pretrained(tiny_model("llama"), "adapter").eval()
    answers: dict[float, list[str]] = {}
    for strength in (0, 0.4, 1):
        find_adapter_head(under).active_layer.strength = strength
        for n in range(5):
            ids = generated(under, [3, 5 + n, 6])
            answers.setdefault(strength, []).append(" ".join(f"w{token}" for token in ids))
        assert [said[f"adapter x{strength:g}", f"p{n}"] for n in range(5)] == answers[strength], strength
    assert [said["base", f"p{n}"] for n in range(5)] == answers[0]
    assert len({tuple(texts) for texts in answers.values()}) == 3
    arms = json.loads(Path("out/record.json").read_text())["arms"]
    assert [(arm["name"], arm["strength"]) for arm in arms] == [
        *(("base", None), ("adapter x0", 0.0), ("adapter x0.4", 0.4), ("adapter x1", 1.0))
    ]


def test_all_strengths_share_a_batch_and_others_are_added_later(ground, monkeypatch):
    answer, policies = answering.sampled_answers, []

    def counted(model, head, prompts, asked, *more):
        policies.append(len(asked))
        return answer(model, head, prompts, asked, *more)

    monkeypatch.setattr(answering, "sampled_answers", counted)
    assert main(words_to("out", "--adapter", "adapter", "--strength", "0.5,1")) == 0
    assert set(policies) == {3}
    before = lines(Path("out"))
    policies.clear()
    assert main(words_to("out", "--adapter", "adapter", "--strength", "1,2,0.5")) == 0
    assert set(policies) == {1}
    assert lines(Path("out"))[: len(before)] == before
    assert {line["arm"] for line in lines(Path("out"))[len(before) :]} == {"adapter x2"}


def test_a_strength_in_the_settings_file_may_be_one_number(ground):
    Path("moe-bias.toml").write_text("[eval]\nstrength = 0.5")
    assert main(words_to("out", "--adapter", "adapter")) == 0
    assert {line["arm"] for line in lines(Path("out"))} == {"base", "adapter x0.5"}


def test_loops_are_measured_on_what_older_runs_kept(ground, monkeypatch, capsys):
    """An older record has neither loops nor strengths; the texts of its samples are all that is needed."""
    assert main(words_to("out", "--adapter", "adapter")) == 0
    record = json.loads(Path("out/record.json").read_text())
    for arm in record["arms"]:
        for name in ("looping", "distinct", "changes", "strength"):
            del arm[name]
    for name in ("record.json", "arms.json"):
        kept = record if name == "record.json" else {arm["name"]: arm for arm in record["arms"]}
        Path("out", name).write_text(json.dumps(kept))
    assert main(["report", "out", "--output", "old"]) == 0
    assert "loops" not in Path("old/report.md").read_text()
    said = [{**line, "text": "w1 " * 40 if line["arm"] == "adapter" else "w1 w2"} for line in lines(Path("out"))]
    (Path("out") / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    monkeypatch.setattr(eval_model, "load_model", None)
    capsys.readouterr()
    assert main(words_to("out", "--adapter", "adapter", "--regrade")) == 0
    base, adapter = json.loads(Path("out/record.json").read_text())["arms"]
    assert (base["looping"]["value"], adapter["looping"]["value"]) == (0, 1)
    assert adapter["changes"]["looping"]["base"] == {"value": 1, "low": 1, "high": 1}
    assert adapter["distinct"]["value"] == pytest.approx(2 / 77)  # w1w1 and 1w1w, of 80 words
    assert "+100.0 [+100.0, +100.0]" in capsys.readouterr().out
    assert main(["report", "out", "--output", "new"]) == 0
    page = Path("new/report.md").read_text()
    assert "loops, points" in page
    assert "+100.0" in page


@pytest.mark.parametrize(
    ("kept", "more"), [(0.0, []), (0.1, []), (0.35, []), (0.5, []), (0.93, []), (0.6, ["--strength", "0.4,1"])]
)
def test_a_run_that_was_cut_goes_on_to_the_same_samples(ground, kept, more):
    assert main(words_to("whole", *SAMPLED, "--adapter", "adapter", *more)) == 0
    assert main(words_to("cut", *SAMPLED, "--adapter", "adapter", *more)) == 0
    path = Path("cut/samples.jsonl")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    Path("cut/record.json").unlink()
    assert main(words_to("cut", *SAMPLED, "--adapter", "adapter", *more)) == 0
    order = itemgetter("arm", "problem", "number")
    assert sorted(lines(Path("cut")), key=order) == sorted(lines(Path("whole")), key=order)
    assert len(lines(Path("cut"))) == (3 if more else 2) * 5 * 2
    records = [json.loads((Path(name) / "record.json").read_text()) for name in ("whole", "cut")]
    assert records[0]["arms"] == records[1]["arms"]


def test_an_interrupt_says_what_is_kept(ground, monkeypatch, capsys):
    answer = answering.sampled_answers
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(answering, "sampled_answers", interrupted)
    assert main(words_to("out", *SAMPLED, "--limit", "5")) == 130
    assert "answers to 3 of 5 problems are kept in out/samples.jsonl" in capsys.readouterr().err
    assert not Path("out/record.json").exists()


def test_an_adapter_that_is_added_later_leaves_the_other_samples_alone(ground, monkeypatch, capsys):
    assert main(words_to("out")) == 0
    before = lines(Path("out"))
    assert main(words_to("out", "--adapter", "adapter")) == 0
    assert lines(Path("out"))[:5] == before
    assert {line["arm"] for line in lines(Path("out"))[5:]} == {"adapter"}
    monkeypatch.setattr(eval_model, "load_model", None)  # all is answered: no model is needed
    assert main(words_to("out", "--adapter", "adapter")) == 0
    save_adapter(ground / "adapter", "model", num_experts=4)
    capsys.readouterr()
    assert complaint(capsys, *words_to("out", "--adapter", "adapter")).startswith(
        "adapter 'adapter' is not the one that 'out' has samples of"
    )


def test_samples_are_graded_again_without_the_model(ground, monkeypatch, capsys):
    assert main(words_to("out")) == 0
    said = [{**line, "text": f"\\boxed{{{n}}}"} for n, line in enumerate(lines(Path("out")))]
    assert {line["outcome"] for line in said} == {"unparseable"}  # words of the tiny model are no numbers
    (Path("out") / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    rows = [json.loads(line) for line in (ground / "problems.jsonl").read_text().splitlines()]
    write(ground / "problems.jsonl", [*rows[:4], {**rows[4], "answer": "5"}])  # a gold answer is mended
    monkeypatch.setattr(eval_model, "load_model", None)
    assert main(words_to("out", "--regrade")) == 0
    again = lines(Path("out"))
    assert [line["outcome"] for line in again] == ["correct"] * 4 + ["wrong"]
    assert [line["answer"] for line in again] == ["0", "1", "2", "3", "4"]
    assert json.loads(Path("out/record.json").read_text())["arms"][0]["accuracy"]["value"] == 0.8
    write(ground / "problems.jsonl", [{**row, "problem": row["problem"] + " w7"} for row in rows])
    assert "holds an unfinished run with other problems" in complaint(capsys, *words_to("out", "--regrade"))


def test_bad_golds_are_in_the_table_and_named(ground, monkeypatch, capsys):
    assert main(words_to("good")) == 0
    assert "bad gold" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (ground / "problems.jsonl").read_text().splitlines()]
    write(ground / "problems.jsonl", [{**rows[0], "answer": "\\frac{1}{"}, *rows[1:]])
    assert main(words_to("out")) == 0
    said = capsys.readouterr().out
    assert re.search(r"right, % . +unread, % . +bad gold, %", said)
    assert re.search(r"base .* 80\.0 . +20\.0", said)
    assert "1 of 5 problems have a gold answer that the grader cannot read ('p0'): every answer to them" in said
    write(ground / "problems.jsonl", rows)
    monkeypatch.setattr(eval_model, "load_model", None)
    assert main(words_to("out", "--regrade")) == 0
    assert "bad gold" not in capsys.readouterr().out


def test_regrading_needs_samples(ground, capsys):
    assert complaint(capsys, *words_to("out", "--regrade")) == (
        "answers to 0 of 5 problems are in out/samples.jsonl; answer the others first, without --regrade"
    )
    assert not Path("out").exists()


def test_answers_of_a_hundred_thousand_tokens_are_graded_and_kept(tmp_path, grader):
    problem = Problem("?", "42", "", {})
    problems = ProblemSet("long", MathematicsTask("long", [problem, problem], grader), [problem, problem], ["a", "b"])
    ledger = Ledger(problems, ["base"], SampleFile(tmp_path, 1))
    long = "We go on and $x_1 = 7$ \u2028 again. " * 12_000
    ledger.keep(0, {"base": [TextAnswer(f"{long} \\boxed{{42}}.", 100_000, True)]})
    ledger.keep(1, {"base": [TextAnswer(long, 100_000, False)]})
    first, second = ledger.file.read()
    assert (first.outcome, first.answer, len(first.text)) == ("correct", "42", len(long) + 12)
    assert second.outcome in ("wrong", "unparseable")
    assert ledger.missing() == {}


def test_a_damaged_line_is_named(tmp_path):
    file = SampleFile(tmp_path, 1)
    file.append([Sample("a", "base", 0, "wrong", "1", 3, True, "1")])
    with file.path.open("a") as opened:
        opened.write('{"problem": \n')
    with pytest.raises(UserError, match=r"line 2 of .*samples.jsonl is damaged"):
        file.answered()


def test_benchmarks_come_from_the_hub_by_name(ground, monkeypatch):
    asked = []

    def load_dataset(name, configuration=None, split=None):
        asked.append((name, configuration, split))
        return [{"id": 60 + n, "question": f"w{5 + n}", "answer": f"so <<1>>\n#### {n}"} for n in range(3)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert main([*COMMON, "--benchmark", "gsm8k", "--limit", "2", "--output", "out"]) == 0
    assert asked == [("openai/gsm8k", "main", "test")]
    assert {line["problem"] for line in lines(Path("out"))} < {"60", "61", "62"}
    record = json.loads(Path("out/record.json").read_text())
    assert record["problems"]["name"] == "gsm8k"
    assert record["protocol"]["samples"] == 1
    assert record["protocol"]["temperature"] == 0
    assert [BENCHMARKS[name].samples for name in ("aime24", "aime25", "amc23", "math500")] == [16, 16, 16, 4]


def test_a_tasks_problems_are_those_that_a_run_with_this_seed_holds_out(ground):
    more = ["--task", "products", "--train-problems", "3", "--limit", "2", "--seed", "5", "--output", "out"]
    assert main([*COMMON, *more]) == 0
    record = json.loads(Path("out/record.json").read_text())
    assert record["problems"]["count"] == 2
    held_out = make_task("products", {}, small=True).problems(5, 5)[3:]
    numbered = ProblemSet("products", make_task("products", {}), held_out, ["1", "2"])
    assert record["problems"]["digest"] == numbered.digest()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--output o", "one of --benchmark, --data and --task is required"),
        ("--output o --task gcd --data d", "--data d and --task gcd exclude each other; give one (data comes from"),
        ("--output o --benchmark AIME'24", 'there is no benchmark "AIME\'24"; near names are aime24 and'),
        ("--output o --benchmark gsm8k --samples 4", "--samples 4 at temperature 0 would be all alike"),
        ("--output o --data problems.jsonl --prompt-template w9", "--prompt-template 'w9' has no {question}"),
        ("--output o --data problems.jsonl --limit 9", "task problems.jsonl gives only 5 different problems, 9 were"),
        ("--output o --data problems.jsonl --adapter nowhere/at-all", "'nowhere/at-all' is neither a folder nor an"),
        (
            "--output o --data problems.jsonl --adapter adapter,adapter",
            "adapter from --adapter is 'adapter,adapter': 'adapter' stands there twice",
        ),
        (
            "--output o --data problems.jsonl --adapter adapter --strength 0.5,1,0.50",
            "strength from --strength is '0.5,1,0.50': 0.5 stands there twice",
        ),
        ("--output o --data problems.jsonl --strength 0.5", "--strength 0.5 needs an adapter; name one with --adapter"),
        (
            "--output o --data problems.jsonl --adapter adapter --strength half",
            "strength from --strength is 'half': input should be a valid number",
        ),
        (
            "--output o --data problems.jsonl --adapter adapter,lora --strength 0.5,1",
            "--strength 0.5,1 does not apply to adapter 'lora' of type LORA: only MOE_BIAS adapters have one; measure",
        ),
        ("--output o --data problems.jsonl --no-base", "--no-base without --adapter leaves nothing to measure"),
        ("--output o --data problems.jsonl --max-new-tokens 200", "--max-new-tokens 200 and the longest prompt of"),
        ("--output o --data empty-gold.jsonl", "problem 'q1' of empty-gold.jsonl has an empty gold answer"),
        ("--output o --data no-gold.jsonl", "row 1 of no-gold.jsonl has columns ['problem']; needed is answer or"),
        ("--output o --data one.jsonl", "one.jsonl has 1 problem; an interval needs at least 2"),
        ("--output o --data problems.jsonl --endpoint http://localhost:1/v1", "--endpoint and --endpoint-model belong"),
        (
            "--output o --data problems.jsonl --endpoint http://localhost:1/v1 --endpoint-model m --adapter adapter",
            "--adapter adapter does not apply to --endpoint; name the server's model of it in --endpoint-model",
        ),
    ],
)
def test_mistakes_are_told_before_any_answer(ground, more, sentence, capsys):
    write(
        ground / "empty-gold.jsonl", [{"id": f"q{n}", "problem": f"w{n + 5}", "answer": "1" * (1 - n)} for n in (0, 1)]
    )
    write(ground / "no-gold.jsonl", [{"problem": "w5"}])
    write(ground / "one.jsonl", [{"problem": "w5", "answer": "1"}])
    save_lora(ground / "lora")
    assert complaint(capsys, *COMMON, *more.split()).startswith(sentence)
    assert not Path("o/samples.jsonl").exists()


def test_a_chat_needs_a_template(ground, capsys):
    save_model(ground / "plain", chat_template=None)
    words = ["plain" if word == "model" else word for word in words_to("out")]
    assert complaint(capsys, *words).endswith("plain' has no chat template; turn --chat off")


def save_prefix():
    prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), prefix).save_pretrained("odd")


def save_wide():
    adapted = get_peft_model(tiny_model("llama", hidden_size=32), MoEBiasConfig(experts="free", num_experts=3))
    adapted.save_pretrained("odd")


def save_wide_lora():
    get_peft_model(tiny_model("llama", hidden_size=32), LoraConfig(target_modules=["q_proj"])).save_pretrained("odd")


@pytest.mark.parametrize(
    ("save", "sentence"),
    [
        (save_prefix, "adapter 'odd' is of type PREFIX_TUNING, which puts tokens of its own before the prompt; serve"),
        (save_wide, "the adapter in 'odd' is of another model: its hidden states and vocabulary are 32 and 97 wide"),
        (save_wide_lora, "adapter 'odd' does not fit the model ("),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_any_answer(ground, save, sentence, capsys):
    save()
    assert complaint(capsys, *words_to("out", "--adapter", "adapter,odd")).startswith(sentence)
    assert not Path("out/samples.jsonl").exists()


def test_other_settings_are_refused_in_the_same_folder(ground, capsys):
    assert main(words_to("out")) == 0
    assert complaint(capsys, *words_to("out", "--seed", "1")).startswith(
        "'out' holds an unfinished run with --seed 0, not 1; give its settings to go on with it, or another --output"
    )


def test_a_hub_data_set_is_read_by_split_and_configuration(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name, configuration, split: [(name, configuration, split)])
    assert read_rows("a/b", "train") == [("a/b", None, "train")]
