"""`moe-bias lm-eval`: the harness measures base and adapter, and its numbers are ours."""

import json
import math
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoTokenizer

from helpers.complaints import complaint
from helpers.evaluations import write
from helpers.models import VOCABULARY, tiny_model
from helpers.saved import save_adapter
from moe_bias import MoEBiasConfig
from moe_bias.backbone import find_head
from moe_bias.cli import main
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.rollout.answers import greedy_answers
from moe_bias.tasks.conversations import Example
from moe_bias.training.problems import policy_of, saved_layer

pytestmark = pytest.mark.usefixtures("folder")
PROMPTS = [[5, 6, 7], [30, 31], [40, 41, 42]]
TARGETS = [[8, 9], [11, 12, 13], [60]]  # "w2", the end token, would be read out of "w20"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{target}"
output_type: {output}
metric_list: [{{metric: {metric}}}]
generation_kwargs: {generation}
"""


def words(ids):
    return " ".join(f"w{token}" for token in ids)


def ours(adapter):
    """The perplexity of the targets, and the greedy answers, under the adapter or the base for None."""
    model = tiny_model("llama")
    head = find_head(model)[1]
    layer = None if adapter is None else saved_layer(adapter, head).layer
    examples = [Example(*pair) for pair in zip(PROMPTS, TARGETS, strict=True)]
    support = list(range(VOCABULARY)) if layer is None else layer.support.tolist()
    features = with_scalars(head, run_backbone(model, examples, 1, "test"), support, "test")
    nll = per_example(token_nll(layer, features, head), features)
    ((*answers,),) = greedy_answers(
        model, head, PROMPTS, [policy_of(layer, head)], stop_ids=[2], max_new_tokens=5, batch_size=3
    )
    return math.exp(nll.mean()), [words(answer.token_ids) for answer in answers]


@pytest.fixture
def tasks(folder, model):
    adapter = save_adapter(folder / "adapter", "model")
    answers = ours(adapter)[1]
    rows = [
        {"text": words(prompt), "target": words(target), "answer": answer}
        for prompt, target, answer in zip(PROMPTS, TARGETS, answers, strict=True)
    ]
    write(folder / "rows.jsonl", rows)
    common = {"data": folder / "rows.jsonl", "cache": folder / "cache"}
    (folder / "tasks").mkdir()
    likelihood = TASK.format(
        name="likely",
        target=" {{target}}",  # for likelihoods the harness puts no space before it
        output="loglikelihood",
        metric="perplexity",
        generation="null",
        **common,
    )
    (folder / "tasks" / "likely.yaml").write_text(likelihood)
    greedy = TASK.format(
        name="spoken",
        target="{{answer}}",
        output="generate_until",
        metric="exact_match",
        generation="{until: [], max_gen_toks: 5, do_sample: false}",
        **common,
    )
    (folder / "tasks" / "spoken.yaml").write_text(greedy)
    return folder


def measured(output, *model):
    """What the harness writes down, by task."""
    words = ["lm-eval", "run", "--tasks", "likely,spoken", "--include_path", "tasks", "--device", "cpu"]
    assert main([*words, "--batch_size", "2", "--output_path", output, *model]) == 0
    (path,) = Path(output).rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    return results["likely"]["perplexity,none"], results["spoken"]["exact_match,none"]


@pytest.mark.parametrize("kind", ["hf", "moe-bias"])
def test_numbers_of_base_and_adapter_are_ours(tasks, kind):
    perplexity, share = measured("base", "--model", kind, "--model_args", "pretrained=model,dtype=float32")
    base, answers = ours(None)
    assert perplexity == pytest.approx(base, rel=1e-4)
    adapted, adapted_answers = ours("adapter")
    assert share == sum(map(str.__eq__, answers, adapted_answers)) / 3 < 1
    arguments = "pretrained=model,peft=adapter,dtype=float32"
    perplexity, share = measured("adapted", "--model", kind, "--model_args", arguments)
    assert perplexity == pytest.approx(adapted, rel=1e-4)
    assert abs(math.log(adapted / base)) > 0.1
    assert share == 1


def test_a_padded_vocabulary_keeps_its_adapter(tasks):
    tiny_model("llama", vocab_size=VOCABULARY + 3).save_pretrained("model")  # the tokenizer has 97 words
    assert len(AutoTokenizer.from_pretrained("model")) == VOCABULARY
    get_peft_model(
        tiny_model("llama", vocab_size=VOCABULARY + 3), MoEBiasConfig(experts="free", num_experts=16)
    ).save_pretrained("padded")
    perplexity, _ = measured("out", "--model", "moe-bias", "--model_args", "pretrained=model,peft=padded,dtype=float32")
    alone, _ = measured("alone", "--model", "moe-bias", "--model_args", "pretrained=model,dtype=float32")
    assert perplexity == alone


def test_arguments_are_the_harness_own(capsys, folder):
    before = list(sys.argv)
    with pytest.raises(SystemExit):
        main(["lm-eval", "run", "--help"])
    assert "--model_args" in capsys.readouterr().out
    assert sys.argv == before


def test_the_harness_may_be_absent(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert complaint(capsys, "lm-eval", "ls", "tasks").startswith(
        "the lm-evaluation-harness needs lm-eval, which is not installed: pip inst"
    )
