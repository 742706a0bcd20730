"""Engines that are started in different ways: what must not matter to answers, and what is refused."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.served import ADAPTERS, SECOND_RUNNER, VOCABULARY, WITHOUT_VLLM, running, write_adapter

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llama import LlamaForCausalLM

from helpers.asking import NAMES, ask, check_against_transformers, greedy, metric, prompts, reference_log_probs
from moe_bias.variables import NOTES


def test_requests_without_an_adapter_are_the_plain_model_bit_for_bit(served):
    asked = [(prompt, greedy(None, logprobs=-1)) for prompt in prompts(8)]
    others = [(prompt, greedy("whole")) for prompt in prompts(8, seed=1)]
    with running(served[0], None) as plain:
        without = ask(plain, [*asked, *((prompt, greedy(None)) for prompt, _ in others)])[:8]
    with running(*served) as engine:
        among_adapted = ask(engine, [*asked, *others])[:8]
    for left, right in zip(among_adapted, without, strict=True):
        assert left.token_ids == right.token_ids
        assert [log_probs_of(step) for step in left.logprobs] == [log_probs_of(step) for step in right.logprobs]


def log_probs_of(step):
    return [step[token].logprob for token in range(VOCABULARY)]


def test_chunked_prefill_changes_nothing(served, reference):
    with running(*served, max_num_batched_tokens=16, max_num_seqs=8) as chunked:
        check_against_transformers(chunked, reference)


def test_preemption_changes_nothing(served, reference):
    with running(*served, kv_cache_memory_bytes=2**19, enable_prefix_caching=False) as cramped:
        check_against_transformers(cramped, reference, count=12, tokens=120)
        assert metric(cramped, "vllm:num_preemptions") > 0


def test_prefixes_are_shared_by_all_adapters_and_the_plain_model(served, reference):
    shared = prompts(1, seed=3)[0] * 40
    with running(*served) as engine:
        block = engine.llm_engine.vllm_config.cache_config.block_size
        shared = (shared * block)[: 1 * block]
        for place, name in enumerate(NAMES):
            before = metric(engine, "vllm:prefix_cache_hits")
            ask(engine, [([*shared, 5 + place], greedy(name))])
            hits = metric(engine, "vllm:prefix_cache_hits") - before
            assert hits == (0 if place == 0 else len(shared))
        (answer,) = ask(engine, [([*shared, 9], greedy("routed"))])
    expected = reference_log_probs(reference("routed"), [*shared, 9], answer.token_ids)
    assert list(answer.token_ids) == expected.argmax(-1).tolist()


def test_without_a_folder_requests_for_adapters_are_refused(served):
    with running(served[0], None) as plain, pytest.raises(VLLMValidationError, match="no adapters are served"):
        ask(plain, [(prompts(1)[0], greedy("routed"))])


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "first model runner leaves logits processors out; set VLLM_USE_V2_MODEL_RUNNER=1",
            marks=pytest.mark.skipif(SECOND_RUNNER, reason="allowed on the second runner"),
        ),
        ({"enable_lora": True}, "LoRA"),
    ],
)
def test_settings_that_pass_adapters_by_are_refused_at_start(served, choices, reason):
    with pytest.raises(ValueError, match=reason), running(*served, **choices):
        pass


def test_adapters_that_do_not_fit_memory_together_come_and_go(served, reference, monkeypatch):
    monkeypatch.setenv("MOE_BIAS_ADAPTER_MEMORY", "1")
    with running(*served) as engine:
        check_against_transformers(engine, reference)


@pytest.mark.parametrize(("kind", "next_kind"), [("routed", "whole"), ("linear", "far")])
def test_a_request_keeps_the_version_that_it_began_with(served, tmp_path, kind, next_kind):
    """New files count for requests that come after them, whether or not others are still running."""
    model, adapters = served
    folder = tmp_path / "adapters"
    shutil.copytree(adapters / kind, folder / "one")
    prompt, params = {"prompt_token_ids": prompts(1)[0]}, greedy("one", tokens=30)
    with running(model, folder) as engine:
        (before,) = ask(engine, [(prompt["prompt_token_ids"], params)])
        core, done = engine.llm_engine, {}
        core.add_request("old", prompt, greedy("one", tokens=30))
        for step in range(200):
            if step == 5:
                shutil.copytree(adapters / next_kind, folder / "one", dirs_exist_ok=True)
                core.add_request("new", prompt, greedy("one", tokens=30))
            done |= {output.request_id: output.outputs[0].token_ids for output in core.step() if output.finished}
        assert done["old"] == before.token_ids
        assert done["new"] == ask(engine, [(prompt["prompt_token_ids"], params)])[0].token_ids != before.token_ids


def test_an_adapter_of_another_model_is_refused_or_told_of_and_never_ends_the_engine(served, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(served[0], dtype=torch.float32)
    torch.nn.init.normal_(model.lm_head.weight)
    for seed in (1, 2):
        write_adapter(tmp_path / f"foreign-{seed}", model, ADAPTERS["linear"], seed)
    with running(served[0], tmp_path) as engine:
        with pytest.raises(VLLMValidationError, match=r"'foreign-1' cannot be served: .* another output embedding"):
            ask(engine, [(prompts(1)[0], greedy("foreign-1"))])
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(NOTES)  # as where requests come in on another machine
            (answer,) = ask(engine, [(prompts(1)[0], greedy("foreign-2"))])
        assert len(answer.token_ids) == 12
        assert "an adapter that is served does not fit the model" in caplog.text
        assert ask(engine, [(prompts(1)[0], greedy(None))])[0].token_ids != answer.token_ids


def test_a_model_that_changes_its_logits_once_more_is_refused(served, monkeypatch):
    original = LlamaForCausalLM.compute_logits
    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", lambda self, hidden: 2 * original(self, hidden))
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM changes its logits in a way of its own"),
        running(*served),
    ):
        pass


@pytest.mark.skipif(SECOND_RUNNER, reason="torch.compile, which ranks call, takes Triton's interpreter for a compiler")
def test_ranks_of_tensor_parallelism_give_the_same_answers(served, reference, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with running(*served, tensor_parallel_size=2, distributed_executor_backend="mp") as engine:
        check_against_transformers(engine, reference, count=12)
