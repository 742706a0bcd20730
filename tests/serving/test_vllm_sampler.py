"""The sampler on vLLM: what it keeps is what transformers computes on the same tokens, and its weights are swapped."""

import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.served import WITHOUT_VLLM
from moe_bias.adapter import save_layer
from moe_bias.backbone import find_head
from moe_bias.mistakes import UserError

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from helpers.asking import ask, metric, prompts
from helpers.samplers import CHOICES, STOPS, check_against_transformers, completions, layer_of, sampling
from moe_bias.rollout.engines import LocalEngine


@pytest.fixture(scope="module")
def model(served):
    return AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def started(served, model, tmp_path_factory):
    with sampling(served, model, tmp_path_factory.mktemp("sampler")) as pair:
        yield pair


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("support", "kind"),
    [
        (tuple(range(2, 60)), {}),
        (tuple(range(2, 95)), {}),
        (None, {}),
        (tuple(range(2, 60)), {"experts": "linear", "expert_rank": 2}),
        (tuple(range(2, 60)), {"experts": "directions", "free_entries": True, "reach": "vocabulary"}),
        (None, {"experts": "directions"}),
    ],
)
def test_what_is_kept_is_what_transformers_computes(started, model, temperature, support, kind):
    sampler, _ = started
    layer, asked = layer_of(support, rows=find_head(model)[1].rows, **kind), prompts(8)
    rollouts = sampler.sample(asked, layer, replace(CHOICES, temperature=temperature), 0)
    check_against_transformers(model, layer, asked, rollouts)
    assert {answer.finished for answer in rollouts.answers} == {True, False}
    for answer, tokens in zip(rollouts.answers, completions(rollouts), strict=True):
        assert tokens[: len(answer.token_ids)] == answer.token_ids
        assert tokens[len(answer.token_ids) :] in ([[stop] for stop in STOPS] if answer.finished else [[]])
        assert answer.finished or len(tokens) == CHOICES.max_new_tokens
    assert rollouts.biased.all()
    assert not list(sampler.spool.folder.iterdir())


def test_new_weights_count_at_once_and_the_prefix_cache_stays(started, model):
    sampler, engine = started
    block = engine.llm_engine.vllm_config.cache_config.block_size
    asked = [[*(prompts(1, seed=3)[0] * block)[:block], 9]]
    choices = replace(CHOICES, max_new_tokens=4, group=1)
    sampler.sample(asked, layer_of(), choices, 0)
    for seed in (2, 3):
        layer, before = layer_of(seed=seed), metric(engine, "vllm:prefix_cache_hits")
        check_against_transformers(model, layer, asked, sampler.sample(asked, layer, choices, 0))
        assert metric(engine, "vllm:prefix_cache_hits") - before == block


def test_an_engine_that_forgets_shares_prefixes_within_a_call_alone(started):
    sampler, engine = started
    block = engine.llm_engine.vllm_config.cache_config.block_size
    asked = [[*(prompts(1, seed=4)[0] * block)[:block], 9]]
    hits = []
    for forgets in (True, True, False):
        before = metric(engine, "vllm:prefix_cache_hits")
        sampling = replace(sampler, engine=LocalEngine(engine, forgets=forgets))
        sampling.sample(asked, layer_of(), replace(CHOICES, max_new_tokens=4, group=2), 0)
        hits.append(metric(engine, "vllm:prefix_cache_hits") - before)
    assert hits == [block, block, 2 * block]


def test_a_layer_is_sampled_from_where_it_acts_now(started, model):
    """Trainers let a layer act on its support alone, whatever its config says that it will do."""
    kind = {"experts": "linear", "expert_rank": 2, "reach": "vocabulary"}
    layer, asked = layer_of(rows=find_head(model)[1].rows, **kind), prompts(4)
    layer.reach = "support"
    check_against_transformers(model, layer, asked, started[0].sample(asked, layer, CHOICES, 0))
    assert layer.config.reach == "vocabulary"


def test_seeds_decide_samples(started):
    sampler, _ = started
    layer, asked = layer_of(), prompts(4)
    first, again, other = (sampler.sample(asked, layer, CHOICES, seed) for seed in (0, 0, 1))
    assert completions(first) == completions(again) != completions(other)
    assert len(set(map(tuple, completions(first)))) > len(asked)  # samples of a group differ


def test_hidden_states_come_back_of_tokens_above_an_entropy_alone(started):
    sampler, _ = started
    layer, asked = layer_of(), prompts(4)
    whole = sampler.sample(asked, layer, CHOICES, 0)
    middle = float(whole.policy_entropy.median())
    part = sampler.sample(asked, layer, replace(CHOICES, keep_above=middle), 0)
    assert completions(part) == completions(whole)
    assert whole.kept.all()
    assert torch.equal(part.kept, part.policy_entropy.double() >= middle)
    assert 0.3 < part.kept.double().mean() < 0.7
    torch.testing.assert_close(part.features.hidden[part.kept], whole.features.hidden[part.kept])
    assert not part.features.hidden[~part.kept].any()
    torch.testing.assert_close(part.policy_entropy, whole.policy_entropy)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("../outside", "'../outside' is no plain file name"),
        ("/etc/passwd", "'/etc/passwd' is no plain file name"),
        (7, "7 is no plain file name"),
        ("missing", "cannot be opened in MOE_BIAS_SPOOL: No such file"),
        ("linked", "cannot be opened in MOE_BIAS_SPOOL"),
        ("short", "has 8 bytes; 3 tokens of this server's model, whose hidden states are 64 numbers of float32, need"),
    ],
)
def test_records_go_nowhere_but_into_files_made_for_them(started, tmp_path, record, reason):
    sampler, engine = started
    outside, spool = tmp_path / "outside", sampler.spool.folder
    outside.write_bytes(b"untouched")
    (spool / "short").write_bytes(b"12345678")
    (spool / "linked").symlink_to(outside)
    save_layer(layer_of(), sampler.adapters / sampler.name, sampler.model)
    arguments = {"moe_bias": sampler.name, "moe_bias_record": record}
    try:
        with pytest.raises(VLLMValidationError, match=re.escape(reason)):
            ask(engine, [(prompts(1)[0], SamplingParams(max_tokens=3, seed=0, extra_args=arguments))])
    finally:
        sampler.spool.remove(["short", "linked"])
    assert outside.read_bytes() == b"untouched"


@pytest.mark.parametrize("several", [["one", "two"], {"one": 1.0, "two": 0.5}])
def test_several_adapters_are_not_recorded(started, several):
    sampler, engine = started
    for name in several:
        save_layer(layer_of(), sampler.adapters / name, sampler.model)
    given = several if isinstance(several, dict) else "+".join(several)
    arguments = {"moe_bias": given, "moe_bias_record": "file"}
    try:
        with pytest.raises(VLLMValidationError, match=r"of one adapter, and 'moe_bias' names \['one', 'two'\]"):
            ask(engine, [(prompts(1)[0], SamplingParams(max_tokens=3, seed=0, extra_args=arguments))])
    finally:
        for name in several:
            shutil.rmtree(sampler.adapters / name)


def test_a_record_that_breaks_meanwhile_is_told_to_its_client_and_harms_nobody_else(started, model):
    sampler, engine = started

    class Cutting(LocalEngine):
        def _ask(self, name, request, choices):
            super()._ask(name, request, choices)
            os.truncate(sampler.spool.folder / request.arguments["moe_bias_record"], 0)

    with pytest.raises(UserError, match=r"the engine kept nothing of (\d+) of an answer's \1 tokens"):
        replace(sampler, engine=Cutting(engine)).sample(prompts(2), layer_of(), CHOICES, 0)
    layer, asked = layer_of(), prompts(2)
    check_against_transformers(model, layer, asked, sampler.sample(asked, layer, CHOICES, 0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"first_token_only": True}, "sample with transformers"),
        ({"temperature": 0.001}, "vLLM samples at 0.01 in place of temperature = 0.001"),
        ({"max_new_tokens": 10**7}, "buffer_bytes = 4.0 GiB cannot hold"),
    ],
)
def test_choices_that_cannot_be_sampled_by_are_refused(started, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        started[0].sample(prompts(2), layer_of(), replace(CHOICES, **changes), 0)


def test_a_full_disk_is_seen_before_sampling(started):
    sampler = replace(started[0], buffer_bytes=2**62)
    with pytest.raises(UserError, match=r"bytes free, and the samples could need \d"):
        sampler.sample(prompts(2), layer_of(), replace(CHOICES, max_new_tokens=10**12), 0)
