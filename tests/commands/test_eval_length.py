"""`moe-bias eval` on a tiny model: accuracy at equal tokens, and the model that is told more."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

import moe_bias as mb
from helpers.complaints import complaint
from helpers.evaluations import generated, lines, words_to, write
from helpers.models import tiny_model
from helpers.saved import save_adapter
from moe_bias.cli import main
from moe_bias.tasks.mathematics import MathematicsTask
from moe_bias.tasks.verdict import judged


@pytest.fixture
def ground(folder, model, grader):
    write(folder / "problems.jsonl", [{"id": f"p{n}", "problem": f"w{5 + n} w6", "answer": str(n)} for n in range(5)])
    save_adapter(folder / "adapter", "model")
    return folder


def test_a_shorter_limit_gives_what_equal_tokens_said(ground, monkeypatch):
    """Of greedy answers, and of one sample of each problem: what ends by itself is the same under a shorter limit."""

    def verify(task, problems, texts):
        return [judged(len(text) % 2 == 0, "1") for text in texts]

    GenerationConfig(eos_token_id=list(range(2, 20))).save_pretrained("model")
    monkeypatch.setattr(MathematicsTask, "verify", verify)
    sampled = ["--samples", "1", "--temperature", "3", "--adapter", "adapter"]
    for way in ([], sampled):
        out, short = Path(f"long{len(way)}"), Path(f"short{len(way)}")
        assert main(words_to(out, *way, "--max-new-tokens", "8")) == 0
        assert main(words_to(short, *way, "--max-new-tokens", "3")) == 0
        record, cut = json.loads((out / "record.json").read_text()), lines(short)
        for arm in record["arms"]:
            ended = [line for line in cut if line["arm"] == arm["name"] and line["finished"]]
            (point,) = [point for point in arm["at_limits"] if point["limit"] == 3]
            assert point["accuracy"]["value"] == pytest.approx(sum(one["outcome"] == "correct" for one in ended) / 5)
            assert point["tokens"] == pytest.approx(sum(one["tokens"] for one in cut if one["arm"] == arm["name"]) / 5)


def test_an_instruction_is_an_arm_of_the_model_with_more_in_its_prompt(ground, capsys):
    told = ["--instruction", "w7 w8", "--prompt-template", "{question}"]
    assert main(words_to("out", "--adapter", "adapter", *told)) == 0
    assert "instructed is the model without an adapter, told below each prompt: w7 w8" in capsys.readouterr().out
    said = {(line["arm"], line["problem"]): line["text"] for line in lines(Path("out"))}
    for n in range(5):
        for arm, more in (("base", []), ("instructed", [7, 8])):
            ids = generated(tiny_model("llama"), [3, 5 + n, 6, *more])
            assert said[arm, f"p{n}"] == " ".join(f"w{token}" for token in ids)
    arms = json.loads(Path("out/record.json").read_text())["arms"]
    assert [(arm["name"], arm["instruction"]) for arm in arms] == [
        ("base", ""),
        ("instructed", "w7 w8"),
        ("adapter", ""),
    ]
    base = mb.load("model", device="cpu")
    config = {"max_new_tokens": 6, "batch_size": 6, "prompt_template": "{question}", "instruction": "w7 w8"}
    found = mb.evaluate(base, {"base": None}, None, mb.EvalConfig(data="problems.jsonl", **config))
    assert {(one.arm, one.problem): one.text for one in found.samples} == {
        key: text for key, text in said.items() if key[0] != "adapter"
    }
    with pytest.raises(mb.UserError, match="`policies` names 'instructed', which is the one with the `instruction`"):
        mb.evaluate(base, {"instructed": None}, None, mb.EvalConfig(data="problems.jsonl", **config))
    assert complaint(capsys, *words_to("out", "--instruction", "w9", "--prompt-template", "{question}")).startswith(
        "'out' has samples of --instruction 'w7 w8', not of 'w9'; give another --output"
    )
