"""Speculative decoding, under which vLLM's second runner keeps logits processors: what is drafted changes nothing.

Drafts come from the prompt, and from a model that is the plain target: all of them are right for requests without an
adapter, and some are for others.
"""

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.served import HIDDEN, SECOND_RUNNER, VOCABULARY, WITHOUT_VLLM

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not SECOND_RUNNER, reason="CONTRIBUTING.md says how to test the second runner"),
]
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from helpers.asking import (
    NAMES,
    ask,
    check_against_transformers,
    greedy,
    metric,
    prompts,
    reference_log_probs,
    summed_log_probs,
)
from helpers.samplers import CHOICES, layer_of, sampling
from helpers.samplers import check_against_transformers as check_records
from helpers.served import running

PROMPT = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.fixture(scope="module", params=["from the prompt, in parts", "from a model"])
def speculation(request, served):
    """vLLM's settings. In the first case logits are verified a few rows at a time, as those of large batches are."""
    with pytest.MonkeyPatch.context() as patch:
        if "parts" in request.param:
            patch.setattr("vllm.v1.worker.gpu.spec_decode.rejection_sampler.MAX_CHUNK_BYTES", 6 * VOCABULARY * 4)
            yield PROMPT
        else:
            yield {"method": "draft_model", "model": str(served[0]), "num_speculative_tokens": 2}


@pytest.fixture(scope="module")
def engine(served, speculation):
    with running(*served, speculative_config=speculation) as started:
        yield started


def drafted_and_accepted(engine):
    return [metric(engine, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")]


def test_greedy_answers_are_those_without_drafts(engine, reference):
    before = drafted_and_accepted(engine)
    check_against_transformers(engine, reference, 18, 12)
    drafted, accepted = (after - start for after, start in zip(drafted_and_accepted(engine), before, strict=True))
    assert drafted > accepted > 20


def write_eagle(folder, model):
    """A draft of the EAGLE kind, which shares the target's embeddings and head and guesses at random."""
    block = {
        name: tensor for name, tensor in model.model.layers[0].state_dict().items() if "input_layernorm" not in name
    }
    tensors = {f"layers.0.{name}": tensor.clone() for name, tensor in block.items()}
    mixing = torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1})
    config.save_pretrained(folder)
    save_file({**tensors, "fc.weight": mixing}, folder / "model.safetensors")


def test_a_draft_that_shares_the_head_changes_nothing(served, reference, tmp_path):
    write_eagle(tmp_path, AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32))
    eagle = {"method": "eagle", "model": str(tmp_path), "num_speculative_tokens": 2}
    with running(*served, speculative_config=eagle) as engine:
        check_against_transformers(engine, reference, 12, 8)
        assert drafted_and_accepted(engine)[0] > 20


def test_samples_have_the_distribution_without_drafts(engine, reference):
    """The second token, which is the first that may be drafted, over what transformers says of it."""
    prompt, samples, strengths = [20, 21, 20, 21, 20], 300, {"static": 3.0}
    sampled = SamplingParams(temperature=1, max_tokens=2, ignore_eos=True, extra_args={"moe_bias": strengths})
    found_V = torch.zeros(VOCABULARY, dtype=torch.float64)
    for answer in ask(engine, [(prompt, sampled)] * samples):
        found_V[answer.token_ids[1]] += 1
    pairs = [[token, 0] for token in range(VOCABULARY)]
    adapted = torch.stack([summed_log_probs(reference, strengths, prompt, pair).exp() for pair in pairs])
    plain = torch.stack([summed_log_probs(reference, {}, prompt, pair).exp() for pair in pairs])
    first_V = adapted[0, 0]
    assert chance(found_V, first_V @ adapted[:, 1]) > 1e-4
    assert chance(found_V, first_V @ plain[:, 1]) < 1e-8  # drafts that were taken as they are would be found out


def chance(found_V, probs_V):
    """That draws of these probabilities are as far from them; tokens that are expected less than five times are one."""
    expected_V = probs_V * found_V.sum()
    rare_V = expected_V < 5
    found, expected = (torch.cat([each[~rare_V], each[rare_V].sum()[None]]) for each in (found_V, expected_V))
    return chisquare(found, expected * found.sum() / expected.sum()).pvalue


def test_grammars_hold(engine, reference):
    digits = torch.tensor(engine.get_tokenizer().convert_tokens_to_ids(list("0123456789")))
    asked = [(prompts(1, seed=5)[0], name) for name in NAMES]
    rule = StructuredOutputsParams(regex="[0-9]{6}")
    answers = ask(engine, [(prompt, greedy(name, 6, structured_outputs=rule)) for prompt, name in asked])
    for (prompt, name), answer in zip(asked, answers, strict=True):
        expected = reference_log_probs(reference(name), prompt, answer.token_ids)
        assert list(answer.token_ids) == digits[expected[:, digits].argmax(-1)].tolist()


def test_what_is_recorded_is_of_the_tokens_that_were_drawn(served, speculation, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32).eval()
    layer, asked = layer_of(), prompts(6)
    with sampling(served, model, tmp_path, speculative_config=speculation) as (sampler, engine):
        rollouts = sampler.sample(asked, layer, CHOICES, 0)
        assert drafted_and_accepted(engine)[0] > 20
    check_records(model, layer, asked, rollouts)
