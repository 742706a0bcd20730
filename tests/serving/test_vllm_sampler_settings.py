"""The sampler on engines that are started in different ways."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.served import SECOND_RUNNER, WITHOUT_VLLM
from moe_bias.mistakes import UserError

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from helpers.asking import metric, prompts
from helpers.samplers import CHOICES, WithoutSeeds, check_against_transformers, layer_of, sampling
from moe_bias.rollout.engines import LocalEngine


@pytest.fixture(scope="module")
def model(served):
    return AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32).eval()


CRAMPED = {"kv_cache_memory_bytes": 2**19, "block_size": 32}


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        (WithoutSeeds, {"max_num_batched_tokens": 16, "max_num_seqs": 8}),
        (LocalEngine, CRAMPED),
        (WithoutSeeds, {**CRAMPED, "max_num_batched_tokens": 32, "max_num_seqs": 32}),
    ],
)
def test_chunks_and_preemption_keep_the_same_rows(served, model, tmp_path, kind, choices):
    layer, asked = layer_of(), prompts(24)
    with sampling(served, model, tmp_path, kind, **choices) as (sampler, engine):
        rollouts = sampler.sample(asked, layer, replace(CHOICES, max_new_tokens=30, stop_ids=[]), 0)
        preempted = metric(engine, "vllm:num_preemptions")
    assert preempted > 0 or "kv_cache_memory_bytes" not in choices
    check_against_transformers(model, layer, asked, rollouts)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "start the server with --logprobs-mode processed_logprobs"),
        pytest.param(
            {"enable_chunked_prefill": True},
            "start the server with --no-enable-chunked-prefill",
            marks=pytest.mark.skipif(SECOND_RUNNER, reason="the second runner has no generators to rewind"),
        ),
    ],
)
def test_engines_that_could_not_be_right_are_refused(served, model, tmp_path, settings, reason):
    with sampling(served, model, tmp_path, **settings) as (sampler, _), pytest.raises(UserError, match=reason):
        sampler.sample(prompts(1), layer_of(), CHOICES, 0)
