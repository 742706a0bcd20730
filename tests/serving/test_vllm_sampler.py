"""The sampler on vLLM: what it keeps is what transformers computes on the same tokens, and its weights are swapped."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import randomise
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig, UserError
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.rollout.policy import layer_policy
from moe_bias.rollout.sampler import SamplingChoices
from moe_bias.serving.recording import RowLayout, Spool
from moe_bias.support import log_prob_from_adapted
from moe_bias.tasks.conversations import Example

from .conftest import HIDDEN, VOCABULARY, WITHOUT_VLLM, running

pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm import SamplingParams

from moe_bias.adapter import save_layer
from moe_bias.rollout.engines import LocalEngine
from moe_bias.rollout.vllm import VllmSampler

from .asking import ask, metric, prompts

STOPS = [5, 6, 7]
CHOICES = SamplingChoices(temperature=1.0, max_new_tokens=12, group=3, batch_size=4, stop_ids=STOPS)
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(served):
    return AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32).eval()


def layer_of(support=tuple(range(2, 60)), seed=1, **changes):
    layer = MoEBiasLayer(LayerConfig(num_experts=4, support=support, **changes), HIDDEN, VOCABULARY)
    randomise(layer, seed=seed)
    return layer


class WithoutSeeds(LocalEngine):
    """On a CPU vLLM 0.32 cannot cut the prompt of a request that has a seed."""

    def answers(self, requests, choices):
        return super().answers([replace(request, seed=None) for request in requests], choices)


@contextmanager
def sampling(served, model, folder, kind=LocalEngine, **choices):
    """A sampler on an engine of its own, and that engine."""
    choices = {"logprobs_mode": "processed_logprobs", "enable_chunked_prefill": kind is WithoutSeeds, **choices}
    adapters, spool = folder / "adapters", folder / "spool"
    adapters.mkdir()
    spool.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_BIAS_SPOOL", str(spool))
        with running(served[0], adapters, **choices) as engine:
            head = find_head(model)[1]
            layout = RowLayout.of_model(head.hidden_size, head.dtype)
            yield VllmSampler(kind(engine), model, head, adapters, Spool(spool, layout)), engine


@pytest.fixture(scope="module")
def started(served, model, tmp_path_factory):
    with sampling(served, model, tmp_path_factory.mktemp("sampler")) as pair:
        yield pair


def completions(rollouts):
    """Each sample's tokens, the end token included."""
    rows = rollouts.features.token.split(rollouts.features.example.bincount(minlength=len(rollouts.answers)).tolist())
    return [row.tolist() for row in rows]


def check_against_transformers(model, layer, asked, rollouts):
    """Features by teacher-forced extraction, log-probabilities by a whole softmax and by the trainer's reduced one."""
    head, features, temperature = find_head(model)[1], rollouts.features, rollouts.temperature
    answers = completions(rollouts)
    examples = [Example(asked[i // rollouts.group], answer) for i, answer in enumerate(answers)]
    hidden = run_backbone(model, examples, 4, "test")
    warm = replace(head, transform=replace(head.transform, scale=head.transform.scale / temperature))
    expected = with_scalars(warm, hidden, features.support.tolist(), "test")
    for name in ("hidden", "token", "example", "position", "logit", "log_partition", "column"):
        torch.testing.assert_close(getattr(features, name), getattr(expected, name), **CLOSE)
    torch.testing.assert_close(features.rest.log_sum_exp, expected.rest.log_sum_exp, **CLOSE)
    torch.testing.assert_close(features.rest.mean_logit, expected.rest.mean_logit, **CLOSE)
    with torch.no_grad():
        logits_TV = head.logits(hidden.hidden)
        torch.testing.assert_close(features.entropy, entropy_from_logits(logits_TV), **CLOSE)
        policy_TV = layer_policy(layer, head.transform)(hidden.hidden, logits_TV) / temperature
        log_prob_T = policy_TV.log_softmax(-1).gather(-1, features.token[:, None]).squeeze(-1)
        torch.testing.assert_close(rollouts.log_prob, log_prob_T, **CLOSE)
        torch.testing.assert_close(rollouts.policy_entropy, entropy_from_logits(policy_TV), **CLOSE)
        logits_TM = head.columns(features.support)(features.hidden)
        move_TM = layer.strength * layer(features.hidden, features.entropy).bias
        reduced_T = log_prob_from_adapted(
            features.logit, features.column, (logits_TM + move_TM) / temperature, features.rest
        )
    torch.testing.assert_close(rollouts.log_prob, reduced_T, **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("support", [tuple(range(2, 60)), tuple(range(2, 95)), None])
def test_what_is_kept_is_what_transformers_computes(started, model, temperature, support):
    sampler, _ = started
    layer, asked = layer_of(support), prompts(8)
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


def test_seeds_decide_samples(started):
    sampler, _ = started
    layer, asked = layer_of(), prompts(4)
    first, again, other = (sampler.sample(asked, layer, CHOICES, seed) for seed in (0, 0, 1))
    assert completions(first) == completions(again) != completions(other)
    assert len(set(map(tuple, completions(first)))) > len(asked)  # samples of a group differ


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        (WithoutSeeds, {"max_num_batched_tokens": 16, "max_num_seqs": 8}),
        (LocalEngine, {"kv_cache_memory_bytes": 2**19, "enable_prefix_caching": False}),
        (WithoutSeeds, {"kv_cache_memory_bytes": 2**19, "enable_prefix_caching": False, "max_num_batched_tokens": 32}),
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
        ({"enable_chunked_prefill": True}, "start the server with --no-enable-chunked-prefill"),
    ],
)
def test_engines_that_could_not_be_right_are_refused(served, model, tmp_path, settings, reason):
    with sampling(served, model, tmp_path, **settings) as (sampler, _), pytest.raises(UserError, match=reason):
        sampler.sample(prompts(1), layer_of(), CHOICES, 0)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("../outside", "no plain file name"),
        ("/etc/passwd", "no plain file name"),
        ("missing", "cannot be opened in MOE_BIAS_SPOOL: No such file"),
        ("short", "has 8 bytes; 3 tokens of this server's model, whose hidden states are 64 numbers of float32"),
        ("linked", "cannot be opened in MOE_BIAS_SPOOL"),
    ],
)
def test_records_go_nowhere_but_into_files_made_for_them(started, tmp_path, record, reason):
    sampler, engine = started
    spool = sampler.spool.folder
    (spool / "short").write_bytes(b"12345678")
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    (spool / "linked").symlink_to(outside)
    save_layer(layer_of(), sampler.adapters / sampler.name, sampler.model)
    arguments = {"moe_bias": sampler.name, "moe_bias_record": record}
    params = SamplingParams(max_tokens=3, seed=0, extra_args=arguments)
    with pytest.raises(ValueError, match=reason):
        ask(engine, [(prompts(1)[0], params)])
    assert outside.read_bytes() == b"untouched"
    sampler.spool.remove(["short", "linked"])


def test_a_record_that_goes_away_harms_nobody_else(started, model):
    """An engine that serves others goes on; the client is told."""
    sampler, engine = started

    class Removing(LocalEngine):
        def answers(self, requests, choices):
            sampler.spool.remove([requests[0].arguments["moe_bias_record"]])
            return super().answers(requests, choices)

    with pytest.raises(UserError, match="cannot be opened in MOE_BIAS_SPOOL"):
        replace(sampler, engine=Removing(engine)).sample(prompts(2), layer_of(), CHOICES, 0)
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
