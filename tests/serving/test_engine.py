"""vLLM's engine against transformers and PEFT: the same tokens and the same logits, whatever else is in the batch."""

import json
import random
import re

import pytest
import torch

from helpers.served import ADAPTERS, SECOND_RUNNER, VOCABULARY, WITHOUT_VLLM, running

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from helpers.asking import (
    NAMES,
    ask,
    check_against_transformers,
    greedy,
    prompts,
    reference_log_probs,
    summed_log_probs,
)


@pytest.fixture(scope="module")
def engine(served):
    with running(*served) as started:
        yield started


def test_mixed_batches_are_those_of_transformers(engine, reference):
    check_against_transformers(engine, reference)


def test_each_adapter_changes_answers(engine):
    """Or the comparison above would show nothing."""
    answers = [ask(engine, [(prompt, greedy(name)) for prompt in prompts(8)]) for name in NAMES]
    texts = [tuple(tuple(answer.token_ids) for answer in each) for each in answers]
    assert len(set(texts)) == len(NAMES)


def test_strength_scales_the_bias(engine, reference, served):
    prompt = prompts(1)[0]
    params = greedy("whole", tokens=1, logprobs=-1)
    params.extra_args["moe_bias_strength"] = 0.0
    (answer,) = ask(engine, [(prompt, params)])
    expected = reference_log_probs(reference(None), prompt, answer.token_ids)
    found = torch.tensor([[answer.logprobs[0][token].logprob for token in range(VOCABULARY)]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


SEVERAL = (
    {"routed": 0.7, "static": 1.0},
    '{"linear": 0.3, "far": -0.4, "whole": 1.5}',
    {"static": 2.0},
    "routed+whole",
    "far",
)
"""`moe_bias` of requests that share a batch, and of one that names one adapter as before."""


def strengths_of(given):
    if isinstance(given, dict):
        return given
    return json.loads(given) if given.startswith("{") else {name: ADAPTERS[name].strength for name in given.split("+")}


def test_biases_of_several_adapters_add(engine, reference):
    """What vLLM serves under several is transformers' plain model plus what PEFT says that each adapter adds."""
    asked = [(prompt, SEVERAL[place % len(SEVERAL)]) for place, prompt in enumerate(prompts(25, seed=3))]
    answers = ask(engine, [(prompt, greedy(given, logprobs=-1)) for prompt, given in asked])
    for (prompt, given), answer in zip(asked, answers, strict=True):
        expected = summed_log_probs(reference, strengths_of(given), prompt, answer.token_ids)
        assert list(answer.token_ids) == expected.argmax(-1).tolist()
        found = torch.tensor([[step[token].logprob for token in range(VOCABULARY)] for step in answer.logprobs])
        torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)


def counted(adapter):
    kinds = ("requests", "tokens")
    return [REGISTRY.get_sample_value(f"moe_bias:{kind}_total", {"adapter": adapter}) or 0 for kind in kinds]


def test_requests_and_tokens_are_counted_by_adapter(engine):
    before = {name: counted(name) for name in ("static", "far", "absent")}
    several = SamplingParams(temperature=1, n=3, max_tokens=4, ignore_eos=True, extra_args={"moe_bias": "static+far"})
    ask(engine, [(prompts(1)[0], greedy("static", 7)), (prompts(1)[0], several), (prompts(1)[0], greedy(None, 50))])
    with pytest.raises(VLLMValidationError):
        ask(engine, [(prompts(1)[0], greedy("absent"))])
    found = {name: [after - start for after, start in zip(counted(name), before[name], strict=True)] for name in before}
    assert found == {"static": [2, 7 + 3 * 4], "far": [1, 3 * 4], "absent": [0, 0]}


def test_random_joins_leaves_and_cancellations(engine):
    """2,000 requests that come in bursts, some of them cancelled: each answer is the one it gets alone.

    Fewer where Triton interprets the kernels of the second runner.
    """
    draw, total = random.Random(0), 150 if SECOND_RUNNER else 2000
    kinds = [(prompt, name, draw.randrange(1, 20)) for prompt in prompts(total // 50, seed=1) for name in NAMES]
    alone = {place: ask(engine, [(kind[0], greedy(*kind[1:]))])[0].token_ids for place, kind in enumerate(kinds)}
    core, running_now, asked, checked, cancelled = engine.llm_engine, {}, 0, 0, 0
    while asked < total or running_now:
        for _ in range(min(draw.randrange(12), total - asked)):
            place = draw.randrange(len(kinds))
            prompt, name, tokens = kinds[place]
            core.add_request(f"r{asked}", {"prompt_token_ids": prompt}, greedy(name, tokens))
            running_now[f"r{asked}"] = place
            asked += 1
        if running_now and draw.random() < 0.2:
            gone = draw.choice(list(running_now))
            core.abort_request([gone])
            del running_now[gone]
            cancelled += 1
        for output in core.step():
            if output.finished and output.request_id in running_now:
                assert output.outputs[0].token_ids == alone[running_now.pop(output.request_id)]
                checked += 1
    assert checked + cancelled == total
    assert cancelled > total // 100


def test_grammars_mask_what_the_adapter_has_moved(engine, reference):
    """The gate reads the entropy of the unmasked base; tokens that a grammar forbids stay forbidden."""
    digits = torch.tensor(engine.get_tokenizer().convert_tokens_to_ids(list("0123456789")))
    for name in NAMES:
        prompt = prompts(1, seed=5)[0]
        params = greedy(name, tokens=6, structured_outputs=StructuredOutputsParams(regex="[0-9]{6}"))
        (answer,) = ask(engine, [(prompt, params)])
        expected = reference_log_probs(reference(name), prompt, answer.token_ids)
        assert list(answer.token_ids) == digits[expected[:, digits].argmax(-1)].tolist()


def test_samples_follow_their_seed_whatever_is_beside_them(engine):
    prompt = prompts(1)[0]
    sampled = SamplingParams(temperature=1, max_tokens=12, seed=7, ignore_eos=True, extra_args={"moe_bias": "routed"})
    (alone,) = ask(engine, [(prompt, sampled)])
    *_, among_others = ask(engine, [*((other, greedy("whole")) for other in prompts(5)), (prompt, sampled)])
    assert among_others.token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("arguments", "choices", "reason"),
    [
        ({"moe_bias": "routted"}, {}, "no adapter 'routted' on this server; there is 'routed'"),
        ({"moe_bias": 3}, {}, "must be the name of an adapter, or a mapping of names to strengths, got 3"),
        ({"moe_bias": {"routed": 1.0, "routted": 1.0}}, {}, "no adapter 'routted' on this server; there is 'routed'"),
        ({"moe_bias": "routed+routted"}, {}, "no adapter 'routted' on this server; there is 'routed'"),
        ({"moe_bias": "routed+routed"}, {}, "names the adapter 'routed' twice"),
        ({"moe_bias": {"routed": float("inf")}}, {}, "must be a finite number, got inf"),
        ({"moe_bias": {}}, {}, "is an empty mapping"),
        ({"moe_bias": {"routed": 1.0}, "moe_bias_strength": 1.0}, {}, "stands beside a mapping"),
        ({"moe_bias": "../adapters/routed"}, {}, "there is no adapter '../adapters/routed'"),
        ({"moe_bias": "routed", "moe_bias_strength": "much"}, {}, "must be a finite number, got 'much'"),
        ({"moe_bias": "routed", "moe_bias_strength": float("nan")}, {}, "must be a finite number, got nan"),
        (
            {"moe_bias_strength": 1.0},
            {},
            "must be the name of an adapter, or a mapping of names to strengths, got None",
        ),
        ({"moe_bias": "routed", "moe_bias_strenth": 1.0}, {}, "unknown argument 'moe_bias_strenth'"),
        (
            {"moe_bias": "routed", "moe_bias_record": "file"},
            {},
            "keeps nothing of requests without MOE_BIAS_SPOOL",
        ),
        ({"moe_bias": "routed"}, {"prompt_logprobs": 1}, "prompt_logprobs are those of the plain model"),
    ],
)
def test_bad_requests_are_refused_before_any_work(engine, arguments, choices, reason):
    params = SamplingParams(max_tokens=1, extra_args=arguments, **choices)
    with pytest.raises(VLLMValidationError, match=re.escape(reason)):
        ask(engine, [(prompts(1)[0], params)])
