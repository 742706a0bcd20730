import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_bias.config import LayerConfig
from moe_bias.layer import (
    MoEBiasLayer,
    Routing,
    check_layer_tensors,
    entropy_from_logits,
    load_balance_loss,
)

quick = settings(max_examples=25, deadline=None)


@st.composite
def layers(draw, dtype: torch.dtype = torch.float64) -> tuple[MoEBiasLayer, int]:
    """A layer of drawn sizes whose every tensor is random, and a number of tokens."""
    num_experts = draw(st.integers(1, 6))
    vocab_size = draw(st.integers(1, 12))
    support = draw(st.none() | st.lists(st.integers(0, vocab_size - 1), min_size=1, unique=True).map(tuple))
    config = LayerConfig(
        experts="free",
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        support=support,
        entropy_gate=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = MoEBiasLayer(config, hidden_size=draw(st.integers(1, 7)), vocab_size=vocab_size).to(dtype)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.normal_()
        layer.hidden_scale.abs_().add_(0.1)
    return layer, draw(st.integers(0, 5))


def small_layer(**changes) -> MoEBiasLayer:
    torch.manual_seed(0)
    return MoEBiasLayer(
        LayerConfig(**{"experts": "free", "num_experts": 4, "top_k": 2, **changes}), hidden_size=5, vocab_size=11
    )


def bias_of_one_token(layer: MoEBiasLayer, hidden_D: Tensor, entropy: float) -> list[float]:
    """The definition of the layer in plain Python: SPEC 1 for one token, with loops."""
    values = zip(hidden_D, layer.hidden_mean, layer.hidden_scale, strict=True)
    normed = [(float(h) - float(m)) / float(s) for h, m, s in values]
    router = [[0.0] * len(normed)] if layer.router is None else layer.router.weight
    scores = [math.exp(sum(float(g) * n for g, n in zip(row_D, normed, strict=True))) for row_D in router]
    probs = [score / sum(scores) for score in scores]
    chosen = sorted(range(len(probs)), key=lambda expert: -probs[expert])[: layer.config.top_k]
    gate = {expert: probs[expert] / sum(probs[other] for other in chosen) for expert in chosen}
    weight = 1.0
    if layer.entropy_gate is not None:
        alpha, beta = float(layer.entropy_gate.weight), float(layer.entropy_gate.bias)
        weight = 1 / (1 + math.exp(-(alpha * entropy + beta)))
    columns = range(layer.experts.shape[1])
    return [weight * sum(gate[expert] * float(layer.experts[expert, m]) for expert in chosen) for m in columns]


@quick
@given(layers())
@torch.no_grad()
def test_bias_is_the_definition(case):
    layer, tokens = case
    hidden_TD = torch.randn(tokens, layer.hidden_size, dtype=torch.float64)
    entropy_T = torch.rand(tokens, dtype=torch.float64) * 5
    expected = [bias_of_one_token(layer, hidden_TD[t], float(entropy_T[t])) for t in range(tokens)]
    expected_TM = torch.tensor(expected, dtype=torch.float64).reshape(tokens, layer.experts.shape[1])
    torch.testing.assert_close(layer(hidden_TD, entropy_T).bias, expected_TM, rtol=1e-9, atol=1e-9)


@quick
@given(layers())
@torch.no_grad()
def test_gates_share_one_among_the_k_most_probable(case):
    layer, tokens = case
    routing = layer.route(torch.randn(tokens, 3, layer.hidden_size, dtype=torch.float64))
    ones = torch.ones(tokens, 3, dtype=torch.float64)
    torch.testing.assert_close(routing.probs.sum(-1), ones)
    torch.testing.assert_close(routing.gates.sum(-1), ones)
    routed = routing.gates > 0
    assert (routed.sum(-1) == layer.config.top_k).all()
    least_routed = routing.probs.where(routed, torch.inf).amin(-1)
    most_left_out = routing.probs.where(~routed, -torch.inf).amax(-1)
    assert (least_routed >= most_left_out).all()


@torch.no_grad()
def test_one_token_by_hand():
    layer = MoEBiasLayer(LayerConfig(experts="free", num_experts=2, top_k=2), hidden_size=1, vocab_size=1).double()
    layer.router.weight.copy_(torch.tensor([[math.log(3)], [0.0]]))
    layer.experts.copy_(torch.tensor([[4.0], [-4.0]]))
    # Normalisation (7 - 5) / 2 = 1; p = (3, 1) / 4; B: 4 * 3/4 - 4 * 1/4 = 2; w = sigmoid(ln 3) = 3/4; b = 1.5.
    layer.hidden_mean.fill_(5.0)
    layer.hidden_scale.fill_(2.0)
    output = layer(torch.tensor([7.0], dtype=torch.float64), torch.tensor(math.log(3), dtype=torch.float64))
    torch.testing.assert_close(output.bias, torch.tensor([1.5], dtype=torch.float64))
    torch.testing.assert_close(output.weight, torch.tensor(0.75, dtype=torch.float64))


def test_without_the_gate_the_weight_is_one():
    layer = small_layer(entropy_gate=False)
    assert layer.entropy_gate is None
    assert torch.equal(layer(torch.randn(3, 5), torch.rand(3)).weight, torch.ones(3))


def test_fresh_layer_gives_no_bias_and_a_gate_of_sigmoid_of_entropy():
    entropy_T = torch.tensor([0.0, 1.0, 4.0])
    output = small_layer()(torch.randn(3, 5), entropy_T)
    assert torch.equal(output.bias, torch.zeros(3, 11))
    torch.testing.assert_close(output.weight, entropy_T.sigmoid())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bias_is_float32_or_better(dtype):
    output = small_layer()(torch.randn(3, 5).to(dtype), torch.rand(3))
    assert output.bias.dtype == torch.promote_types(dtype, torch.float32)


def test_on_vocabulary_is_zero_off_the_support():
    layer = small_layer(support=(7, 2))
    expected = torch.zeros(11)
    expected[7], expected[2] = 3.0, 4.0
    assert torch.equal(layer.on_vocabulary(torch.tensor([3.0, 4.0])), expected)
    bias_TM = torch.randn(2, 3, 11)
    assert small_layer().on_vocabulary(bias_TM) is bias_TM


def loss_of(probs: list[list[float]], top_k: int, counted: list[bool] | None = None) -> float:
    probs_TE = torch.tensor(probs, dtype=torch.float64)
    top_probs, top_experts = probs_TE.topk(top_k)
    gates_TE = torch.zeros_like(probs_TE).scatter(-1, top_experts, top_probs / top_probs.sum(-1, keepdim=True))
    return float(load_balance_loss(Routing(probs_TE, gates_TE), None if counted is None else torch.tensor(counted)))


FOUR_TOKENS = [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]


@pytest.mark.parametrize(
    ("counted", "loss"),
    [
        # f = (3/4, 1/4), P = (2.6, 1.4) / 4 = (0.65, 0.35): 2 (0.75 * 0.65 + 0.25 * 0.35) = 1.15.
        (None, 1.15),
        ([True, True, True, True], 1.15),
        # f = (1/2, 1/2), P = (1.2, 0.8) / 2: 2 (0.5 * 0.6 + 0.5 * 0.4) = 1.
        ([True, False, False, True], 1.0),
        # f = (1, 0), P = (0.9, 0.1): 2 * 0.9 = 1.8.
        ([True, False, False, False], 1.8),
        ([False, False, False, False], 0.0),
    ],
)
def test_load_balance_by_hand(counted, loss):
    assert loss_of(FOUR_TOKENS, 1, counted) == pytest.approx(loss)


def test_load_balance_counts_every_slot():
    # One token, k = 2: f = (1/2, 1/2, 0), so 3 (0.5 * 0.5 + 0.5 * 0.3) = 1.2.
    assert loss_of([[0.5, 0.3, 0.2]], 2) == pytest.approx(1.2)


@quick
@given(st.integers(1, 8), st.data())
def test_load_balance_is_one_when_uniform(num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    # Each expert is routed to equally often: the tokens' first expert goes round, probabilities are even.
    gates_TE = torch.zeros(num_experts, num_experts)
    for token in range(num_experts):
        gates_TE[token, [(token + slot) % num_experts for slot in range(top_k)]] = 1 / top_k
    probs_TE = torch.full((num_experts, num_experts), 1 / num_experts)
    assert float(load_balance_loss(Routing(probs_TE, gates_TE))) == pytest.approx(1.0)


def test_load_balance_of_no_tokens_is_zero():
    layer = small_layer()
    loss = load_balance_loss(layer.route(torch.empty(0, 5)))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(layer.router.weight.grad, torch.zeros(4, 5))


def test_load_balance_takes_any_leading_shape():
    routing = small_layer().route(torch.randn(2, 3, 5))
    flat = Routing(routing.probs.flatten(0, 1), routing.gates.flatten(0, 1))
    assert torch.equal(load_balance_loss(routing), load_balance_loss(flat))
    one = Routing(routing.probs[0, 0], routing.gates[0, 0])
    assert torch.equal(load_balance_loss(one), load_balance_loss(Routing(one.probs[None], one.gates[None])))


def test_router_learns_only_once_the_experts_differ():
    layer = small_layer()
    hidden_TD, entropy_T, target_TM = torch.randn(6, 5), torch.rand(6), torch.randn(6, 11)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    sizes = []
    for _ in range(2):
        optimizer.zero_grad()
        (layer(hidden_TD, entropy_T).bias - target_TM).square().sum().backward()
        sizes.append((float(layer.experts.grad.abs().max()), float(layer.router.weight.grad.abs().max())))
        optimizer.step()
    (first_experts, first_router), (_, second_router) = sizes
    assert first_experts > 0
    assert first_router == 0
    assert second_router > 0


def test_no_gradient_enters_the_model():
    layer = small_layer()
    torch.nn.init.normal_(layer.experts)
    hidden_TD = torch.randn(3, 5, requires_grad=True)
    layer(hidden_TD, torch.rand(3)).bias.sum().backward()
    assert hidden_TD.grad is None


@settings(max_examples=10, deadline=None)
@given(layers())
def test_gradients_are_those_of_finite_differences(case):
    layer, tokens = case
    names, parameters = zip(*layer.named_parameters(), strict=True)
    hidden_TD = torch.randn(tokens + 1, layer.hidden_size, dtype=torch.float64)
    entropy_T = torch.rand(tokens + 1, dtype=torch.float64)

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        given_values = dict(zip(names, values, strict=True))
        output = torch.func.functional_call(layer, given_values, (hidden_TD, entropy_T))
        return output.bias, load_balance_loss(output.routing)

    assert torch.autograd.gradcheck(outputs, parameters)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(damage):
    layer = small_layer()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["experts"][1, 3] = damage
    with pytest.raises(ValueError, match="adapter tensor 'experts' holds NaN or infinite values; the file is damaged"):
        layer.load_state_dict(state)
    assert torch.equal(layer.experts, torch.zeros(4, 11))


def test_weights_of_another_shape_are_refused():
    state = small_layer(support=(1, 2)).state_dict()
    with pytest.raises(ValueError, match=r"'experts' has shape \(4, 2\), this model and config need \(4, 11\)"):
        small_layer().load_state_dict(state)


def test_tensors_on_the_meta_device_have_only_a_shape_to_check():
    check_layer_tensors({"experts": torch.empty(2, 3, device="meta")}, {"experts": (2, 3)})


def test_saved_and_loaded_layers_agree():
    layer, other = small_layer(support=(3, 1)), small_layer(support=(3, 1))
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.uniform_(0.1, 1)
    other.load_state_dict(layer.state_dict())
    hidden_TD, entropy_T = torch.randn(3, 5), torch.rand(3)
    assert torch.equal(layer(hidden_TD, entropy_T).bias, other(hidden_TD, entropy_T).bias)


def test_support_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="support id 11 is outside the vocabulary of 11 tokens"):
        small_layer(support=(3, 11))


def test_calibration_standardises_what_the_router_sees():
    layer = small_layer()
    hidden = torch.randn(20, 30, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.0]) + 4
    layer.calibrate(hidden)
    normed = (hidden - layer.hidden_mean) / layer.hidden_scale
    torch.testing.assert_close(normed.mean((0, 1)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.flatten(0, 1).std(0), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_calibration_of_one_token_is_refused():
    with pytest.raises(ValueError, match="calibration needs at least 2 hidden states, got 1"):
        small_layer().calibrate(torch.randn(5))


@quick
@given(st.integers(1, 200), st.floats(-1e4, 1e4))
def test_entropy_of_equal_logits_is_log_v(vocab_size, level):
    entropy = entropy_from_logits(torch.full((vocab_size,), level))
    assert float(entropy) == pytest.approx(math.log(vocab_size), abs=2e-6)


@pytest.mark.parametrize(
    ("logits", "entropy"),
    [
        ([0.0, 0.0, -math.inf], math.log(2)),
        ([1e4, -1e4, 0.0], 0.0),
        # q = (3, 1) / 4: 3/4 ln(4/3) + 1/4 ln 4 = 0.5623351446.
        ([math.log(3), 0.0], 0.5623351446),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_by_hand(logits, entropy, dtype):
    found = entropy_from_logits(torch.tensor(logits, dtype=dtype))
    assert found.dtype == dtype
    assert float(found) == pytest.approx(entropy, abs=1e-6)


def test_entropy_of_half_precision_logits_is_summed_in_float32():
    logits_TV = torch.randn(3, 5000).half()
    assert entropy_from_logits(logits_TV).dtype == torch.float32
    torch.testing.assert_close(entropy_from_logits(logits_TV), entropy_from_logits(logits_TV.float()))
