"""Experts that are made through the output embedding, beside their plain reference and the older free ones."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.models import HIDDEN, VOCABULARY, Rows, randomise, tiny_model, token_ids
from helpers.objectives import rows_of
from helpers.training import features_of
from moe_bias import MoEBiasConfig, find_adapter_head, load_moe_bias_layer
from moe_bias.adapter import read_adapter, save_layer
from moe_bias.backbone import OutputRows, adapted_logits, find_head
from moe_bias.config import LayerConfig, SFTConfig
from moe_bias.evaluation.likelihood import token_nll
from moe_bias.features.adapted import adapted_policy, policy_stats
from moe_bias.layer import MoEBiasLayer, entropy_from_logits, load_balance_loss, plain_bias
from moe_bias.mistakes import UserError
from moe_bias.support import full_log_prob
from moe_bias.training.gradients import gradients, plain_loss
from moe_bias.training.objectives import DAPO, Sampled, Supervised, Then
from moe_bias.training.sft import fit

OLD = Path(__file__).parent / "adapters"
SUPPORT = tuple(range(2, 60))
KINDS = [
    {"experts": "directions"},
    {"experts": "directions", "free_entries": True},
    {"experts": "linear", "expert_rank": 3},
    {"experts": "linear", "expert_rank": 2, "free_entries": True},
]
quick = settings(max_examples=40, deadline=None)


@st.composite
def layers(draw) -> tuple[MoEBiasLayer, int, Tensor]:
    """A float64 layer of drawn sizes and kind whose every tensor is random, a number of tokens, its support's rows."""
    num_experts, vocab_size, hidden_size = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 7))
    support = draw(st.none() | st.lists(st.integers(0, vocab_size - 1), min_size=1, unique=True).map(tuple))
    config = _config(draw, num_experts, support)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    weight_VD = torch.randn(vocab_size, hidden_size, dtype=torch.float64)
    layer = MoEBiasLayer(config, hidden_size, vocab_size, Rows(weight_VD)).double()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.normal_()
        layer.hidden_scale.abs_().add_(0.1)
    return layer, draw(st.integers(0, 5)), weight_VD[layer.support_or_all()]


def _config(draw, num_experts: int, support: tuple[int, ...] | None) -> LayerConfig:
    kind = draw(st.sampled_from([{"experts": "free"}, *KINDS]))
    return LayerConfig(
        **{"expert_rank": draw(st.integers(1, 9)), **kind},
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        support=support,
        entropy_gate=draw(st.booleans()),
    )


def layer_at(head, support=SUPPORT, **choices) -> MoEBiasLayer:
    """A layer at a model's head whose every tensor is random."""
    torch.manual_seed(0)
    layer = head.layer(LayerConfig(**{"num_experts": 4, "support": support, **choices}))
    randomise(layer)
    return layer


@quick
@given(layers())
def test_bias_is_that_of_the_plain_reference(case):
    layer, tokens, rows_MD = case
    hidden_TD = torch.randn(tokens, layer.hidden_size, dtype=torch.float64)
    entropy_T = torch.rand(tokens, dtype=torch.float64) * 5
    expected_TM = plain_bias(layer, hidden_TD, entropy_T, rows_MD)
    torch.testing.assert_close(layer(hidden_TD, entropy_T).bias, expected_TM, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden_TD, entropy_T).bias, expected_TM, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_one_token_by_hand():
    config = LayerConfig(experts="linear", expert_rank=1, num_experts=1, top_k=1, entropy_gate=False)
    layer = MoEBiasLayer(config, 2, 3, Rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])))
    layer.directions.copy_(torch.tensor([[1.0, 0.5]]))
    layer.writes.copy_(torch.tensor([[[0.0, 1.0]]]))
    layer.reads.copy_(torch.tensor([[[3.0, 1.0]]]))
    layer.hidden_mean.fill_(1.0)
    # n(h) = (1, 0), V n = 3, so the direction is (1, 0.5) + 3 (0, 1) = (1, 3.5); W times that: 1, 3.5, 2 - 3.5.
    bias_M = layer(torch.tensor([2.0, 1.0]), torch.tensor(0.7)).bias
    torch.testing.assert_close(bias_M, torch.tensor([1.0, 3.5, -1.5]))
    assert layer.table().tolist() == [[1.0, 0.5, 1.5], [0.0, 1.0, -1.0]]


@quick
@given(layers())
def test_gradient_of_the_bias(case):
    layer, _, _ = case
    hidden_TD, entropy_T = torch.randn(2, layer.hidden_size).double(), torch.rand(2).double()
    names = [name for name, _ in layer.named_parameters()]

    def bias(*parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (hidden_TD, entropy_T)).bias

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in layer.parameters())
    assert torch.autograd.gradcheck(bias, values, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "cohere", "phi"])
def test_a_fresh_layer_leaves_every_bit(name, kind):
    model = tiny_model(name)
    with torch.no_grad():
        before = model(token_ids()).logits
        adapted = get_peft_model(model, MoEBiasConfig(num_experts=4, support=list(SUPPORT), **kind))
        assert torch.equal(adapted(token_ids()).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_moves_within_three_steps_and_no_weight_of_the_model(kind):
    model = get_peft_model(tiny_model("llama-tied"), MoEBiasConfig(num_experts=4, support=list(SUPPORT), **kind))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", [SUPPORT, (7,), None])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi", "granite"])
def test_log_prob_and_its_gradients_are_those_of_the_full_softmax(name, support, kind):
    head = find_head(tiny_model(name))[1]
    layer = layer_at(head, support, load_balance_weight=0.3, strength=0.7, **kind)
    features = features_of(head, support=range(VOCABULARY) if support is None else support)
    logits_of = head.columns(features.support)
    exact = copy.deepcopy(layer).double()
    move_TM = exact.strength * plain_bias(
        exact, features.hidden.double(), features.entropy.double(), head.rows(features.support).double()
    )
    logits_TV = head.logits(features.hidden).double()
    move_TM = head.transform.reachable(logits_TV[:, features.support], move_TM)
    log_prob_T = full_log_prob(logits_TV, move_TM, features.support, features.token)
    adapted = adapted_policy(layer, features, logits_of(features.hidden), head.transform)
    torch.testing.assert_close(adapted.log_prob.double(), log_prob_T, rtol=1e-5, atol=1e-5)
    loss = gradients(layer, features, lambda rows: logits_of(features.hidden[rows]), head.transform, Supervised())
    balance = load_balance_loss(adapted.routing)
    exact_loss = -log_prob_T.mean()
    torch.testing.assert_close(float(loss.total), float(exact_loss) + 0.3 * float(balance), rtol=1e-5, atol=1e-5)
    supervised = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    (0.3 * load_balance_loss(layer.route(features.hidden))).backward()
    exact_loss.backward()
    for n, parameter in exact.named_parameters():
        own = 0 if dict(layer.named_parameters())[n].grad is None else dict(layer.named_parameters())[n].grad
        torch.testing.assert_close((supervised[n] - own).double(), parameter.grad, rtol=2e-4, atol=2e-6, msg=n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "objective"), [(1.0, DAPO()), (0.7, DAPO(kl_weight=0.3, entropy_weight=0.1))])
def test_gradients_of_policies_are_those_of_autograd_over_the_whole_batch(kind, temperature, objective):
    head = find_head(tiny_model())[1]
    layer, features = layer_at(head, **kind), features_of(head)
    logits_TM = head.columns(features.support)(features.hidden) / temperature
    sampled = Sampled(torch.full((len(features),), -2.0), torch.linspace(-1, 1, len(features)))
    found = gradients(layer, features, rows_of(logits_TM), head.transform, objective, sampled, temperature)
    by_chunks = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    adapted = adapted_policy(layer, features, logits_TM, head.transform, temperature, objective.needs_stats)
    whole = plain_loss(objective, adapted, Then(features, sampled), 0.01)
    whole.total.backward()
    torch.testing.assert_close(found.total, whole.total.detach())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(by_chunks[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [{"experts": "free"}, *KINDS])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
@torch.no_grad()
def test_every_way_to_apply_a_layer_gives_the_same_logits(tmp_path, name, kind):
    model = tiny_model(name)
    head = find_head(model)[1]
    layer = layer_at(head, **kind)
    save_layer(layer, tmp_path, model)
    captured: list[Tensor] = []
    hook = head.module.register_forward_hook(lambda _, args, __: captured.append(args[0]))
    base = model(token_ids()).logits
    hook.remove()
    expected = adapted_logits(layer, head.transform, captured[0][0], entropy_from_logits(base[0]), base[0])
    assert float((expected - base[0]).abs().max()) > 0.1
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    torch.testing.assert_close(loaded(token_ids()).logits[0], expected, rtol=1e-4, atol=1e-4)
    functional = load_moe_bias_layer(model, tmp_path)
    assert all(torch.equal(value, functional.state_dict()[key]) for key, value in layer.state_dict().items())


@torch.no_grad()
def test_reach_of_the_whole_vocabulary_is_the_same_vectors_on_all_tokens():
    head = find_head(tiny_model())[1]
    layer = layer_at(head, experts="linear", expert_rank=2, free_entries=True)
    hidden_TD, entropy_T = torch.randn(5, HIDDEN), torch.rand(5)
    near = layer.on_vocabulary(layer(hidden_TD, entropy_T).bias)
    layer.reach = "vocabulary"
    far = layer(hidden_TD, entropy_T).bias
    support = torch.tensor(SUPPORT)
    torch.testing.assert_close(far[:, support], near[:, support])
    assert layer.support is None
    off = torch.ones(VOCABULARY, dtype=torch.bool)
    off[support] = False
    assert not near[:, off].any()
    assert far[:, off].all()
    layer.experts.zero_()
    assert torch.equal(layer(hidden_TD, entropy_T).bias[:, off], far[:, off])  # free entries stay on the support


@torch.no_grad()
def test_a_kept_table_follows_its_parameters_and_the_embedding():
    model = tiny_model()
    head = find_head(model)[1]
    layer = layer_at(head, experts="linear", expert_rank=2, free_entries=True)
    first = layer.table()
    assert layer.table() is first
    for change in (
        lambda: layer.directions.mul_(2),
        lambda: layer.writes.add_(1),
        lambda: layer.experts.zero_(),
        lambda: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        lambda: head.module.weight.mul_(3),
        lambda: layer.double(),
    ):
        before = layer.table()
        change()
        kept = layer.table()
        assert not torch.equal(kept, before)
        with torch.enable_grad():  # made anew
            torch.testing.assert_close(kept, layer.table())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    before = layer.table()
    with torch.enable_grad():
        layer.table().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.table(), before)


def test_a_table_made_in_inference_mode_serves_training_afterwards():
    head = find_head(tiny_model())[1]
    layer = layer_at(head, experts="directions").requires_grad_(False)
    layer.router.requires_grad_(True)
    with torch.inference_mode():
        layer.table()
    layer(torch.randn(3, HIDDEN), torch.rand(3)).bias.sum().backward()
    assert layer.router.weight.grad is not None


def test_a_copied_layer_is_of_the_same_model_and_a_copied_model_has_its_own():
    model = get_peft_model(tiny_model(), MoEBiasConfig(experts="directions", num_experts=2))
    layer = find_adapter_head(model).active_layer
    assert copy.deepcopy(layer).embedding.state() == layer.embedding.state()
    twin = copy.deepcopy(model)
    assert find_adapter_head(twin).active_layer.embedding.state() != layer.embedding.state()
    assert (
        find_adapter_head(twin).active_layer.embedding.state()[0]
        == find_adapter_head(twin).base_layer.weight.data_ptr()
    )


def test_a_layer_without_its_models_embedding_says_what_it_needs():
    layer = MoEBiasLayer(LayerConfig(experts="linear"), 4, 9)
    with pytest.raises(UserError, match=r"made through the model's output embedding, .* find_head\(model\)"):
        layer(torch.zeros(1, 4), torch.zeros(1))


def test_rows_of_a_packed_weight_are_those_the_module_computes_with():
    linear = nn.Linear(5, 7)

    class Packed(nn.Module):
        in_features, out_features = 5, 7

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, hidden):
            return linear(hidden)

    for token in (None, torch.tensor([6, 0])):
        torch.testing.assert_close(OutputRows(Packed())(token), OutputRows(linear)(token))


@pytest.mark.parametrize("folder", sorted(path.name for path in OLD.iterdir()))
@torch.no_grad()
def test_adapters_of_the_first_version_give_the_same_bits(folder):
    config, tensors = read_adapter(OLD / folder)
    assert config.experts == "free"
    model = PeftModel.from_pretrained(tiny_model(config.base_model_name_or_path), OLD / folder)
    head = find_adapter_head(model)
    layer = head.active_layer
    found = model(token_ids()).logits
    torch.testing.assert_close(found, load_file(OLD / folder / "expected.safetensors")["logits"])
    # The layer's whole effect as the first version computed it.
    captured: list[Tensor] = []
    hook = head.base_layer.register_forward_hook(lambda _, args, __: captured.append(args[0]))
    model(token_ids())
    hook.remove()
    mixture = layer.mix(captured[0], torch.ones(captured[0].shape[:-1]))
    shares = layer.route(captured[0]).gates * mixture.weight.unsqueeze(-1)
    stored = next(value for name, value in tensors.items() if name.endswith("experts"))
    assert torch.equal(layer(captured[0], torch.ones(captured[0].shape[:-1])).bias, shares @ stored)


def test_an_adapter_knows_the_output_embedding_that_it_was_made_on(tmp_path):
    model = tiny_model()
    save_layer(layer_at(find_head(model)[1], experts="directions"), tmp_path, model)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["embedding_sample"]) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_moe_bias_layer(tiny_model().to(torch.bfloat16), tmp_path)
    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight.normal_()
    with pytest.raises(UserError, match=r"made on another output embedding: entries differ by up to \d"):
        PeftModel.from_pretrained(other, tmp_path)
    near = tiny_model()
    with torch.no_grad():
        step = near.lm_head.weight.abs().max() / 7
        near.lm_head.weight.copy_((near.lm_head.weight / step).round() * step)
    with pytest.warns(UserWarning, match=r"differ by up to .* may be a quantised copy"):
        load_moe_bias_layer(near, tmp_path)


def test_policy_stats_are_of_the_applied_table():
    head = find_head(tiny_model())[1]
    layer, features = layer_at(head, experts="linear", expert_rank=2), features_of(head)
    logits_of = head.columns(features.support)
    stats = policy_stats(layer, features, lambda rows: logits_of(features.hidden[rows]), head.transform)
    still = replace(stats, kl=torch.zeros_like(stats.kl))
    assert (stats.kl > 0).all()
    layer.strength = 0.0
    stats = policy_stats(layer, features, lambda rows: logits_of(features.hidden[rows]), head.transform)
    torch.testing.assert_close(stats.kl, still.kl.to(stats.kl.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_likelihood_of_a_layer_with_the_whole_vocabulary_is_that_of_its_logits(name):
    head = find_head(tiny_model(name))[1]
    layer = head.layer(LayerConfig(num_experts=4, experts="directions", support=SUPPORT, reach="vocabulary"))
    features = features_of(head)
    fit(layer, features, head, SFTConfig(epochs=4, expert_rate=0.1), "test")
    assert layer.reach == "vocabulary"
    logits_TV = head.logits(features.hidden)
    adapted_TV = adapted_logits(layer, head.transform, features.hidden, features.entropy, logits_TV).double()
    expected_T = -adapted_TV.log_softmax(-1).gather(-1, features.token[:, None]).squeeze(-1)
    torch.testing.assert_close(token_nll(layer, features, head).double(), expected_T, rtol=1e-5, atol=1e-5)
    layer.reach = "support"
    assert not torch.allclose(token_nll(layer, features, head).double(), expected_T, rtol=1e-3)


@torch.no_grad()
def test_a_compiled_model_follows_weights_that_are_loaded_later():
    config = MoEBiasConfig(experts="linear", num_experts=4, expert_rank=2)
    model = get_peft_model(tiny_model(), config).eval()
    layer = find_adapter_head(model).active_layer
    randomise(layer)
    compiled = torch.compile(model.get_base_model(), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(token_ids()).logits, model(token_ids()).logits)
        layer.load_state_dict({name: value + 0.5 for name, value in layer.state_dict().items()})
