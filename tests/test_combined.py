"""Several layers at once, against the plain sum of what each adds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import HIDDEN, VOCABULARY, randomise
from moe_bias.backbone import HeadTransform, OutputRows, adapted_logits
from moe_bias.combined import summed_logits
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.layer.reference import plain_bias

CONFIGS = (
    LayerConfig(experts="free", num_experts=5, support=(0, 7, 96)),
    LayerConfig(experts="linear", expert_rank=2, free_entries=True, num_experts=3, support=(7, 8, 50)),
    LayerConfig(experts="directions", num_experts=1, top_k=1, support=(0, 7, 96), reach="vocabulary"),
    LayerConfig(experts="free", num_experts=2, top_k=1, entropy_gate=False),
)
EMBEDDING = torch.nn.Linear(HIDDEN, VOCABULARY)
strengths = st.floats(-2, 2, allow_subnormal=False)
chosen = st.lists(st.tuples(st.integers(0, len(CONFIGS) - 1), strengths), min_size=1, max_size=5)


def layer_of(number, dtype):
    torch.manual_seed(number)
    layer = MoEBiasLayer(CONFIGS[number], HIDDEN, VOCABULARY, OutputRows(EMBEDDING)).requires_grad_(False)
    randomise(layer, seed=number)
    return layer.to(dtype)


def base(dtype, transform, rows=4):
    generator = torch.Generator().manual_seed(0)
    hidden_BD = torch.randn(rows, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    raw_BV = 3 * torch.randn(rows, VOCABULARY, dtype=torch.float64, generator=generator)
    logits_BV = transform.apply(raw_BV.to(dtype))
    return hidden_BD, logits_BV, entropy_from_logits(logits_BV)


def plain_move(numbers, hidden_BD, entropy_B):
    """Each layer's bias expert by expert, put on the vocabulary token by token, in float64."""
    move_BV = torch.zeros(len(hidden_BD), VOCABULARY, dtype=torch.float64)
    for number, strength in numbers:
        layer = layer_of(number, torch.float64)
        token_M = layer.support_or_all()
        rows_MD = EMBEDDING.weight.detach().double()[token_M]
        bias_BM = plain_bias(layer, hidden_BD.double(), entropy_B.double(), rows_MD)
        for column, token in enumerate(token_M.tolist()):
            move_BV[:, token] += strength * bias_BM[:, column]
    return move_BV


@settings(max_examples=30, deadline=None)
@given(numbers=chosen, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_biases_add(numbers, dtype):
    hidden_BD, logits_BV, entropy_B = base(dtype, HeadTransform())
    parts = [(layer_of(number, dtype), strength) for number, strength in numbers]
    found_BV = summed_logits(parts, HeadTransform(), hidden_BD, entropy_B, logits_BV)
    move_BV = plain_move(numbers, hidden_BD, entropy_B)
    # Biases of linear experts are sums of hundreds of products: float32's rounding is relative to their size.
    tolerance = (1e-11 if dtype == torch.float64 else 2e-5) * (1 + float(move_BV.abs().max()) + 10 * len(numbers))
    torch.testing.assert_close(found_BV.double(), logits_BV.double() + move_BV, atol=tolerance, rtol=0)
    untouched = move_BV == 0
    assert torch.equal(found_BV[untouched], logits_BV[untouched])


@settings(max_examples=30, deadline=None)
@given(numbers=chosen)
def test_a_soft_cap_bounds_the_sum_once(numbers):
    transform = HeadTransform(cap=5.0)
    hidden_BD, logits_BV, entropy_B = base(torch.float64, transform)
    parts = [(layer_of(number, torch.float64), strength) for number, strength in numbers]
    found_BV = summed_logits(parts, transform, hidden_BD, entropy_B, logits_BV)
    expected_BV = logits_BV + transform.reachable(logits_BV, plain_move(numbers, hidden_BD, entropy_B))
    torch.testing.assert_close(found_BV, expected_BV, atol=1e-9, rtol=0)
    assert (found_BV.abs() < 5).all()


@pytest.mark.parametrize("cap", [None, 5.0])
def test_opposite_strengths_leave_the_base(cap):
    """Under a soft-cap too: parts that were bounded one after the other would not come back."""
    transform = HeadTransform(cap=cap)
    hidden_BD, logits_BV, entropy_B = base(torch.float64, transform)
    layer = layer_of(3, torch.float64)
    found_BV = summed_logits([(layer, 4.0), (layer, -4.0)], transform, hidden_BD, entropy_B, logits_BV)
    assert torch.equal(found_BV, logits_BV)
    one_BV = summed_logits([(layer, 4.0)], transform, hidden_BD, entropy_B, logits_BV)
    assert not torch.allclose(one_BV, logits_BV)


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_one_layer_at_its_own_strength_is_that_layer_bit_for_bit(number):
    hidden_BD, logits_BV, entropy_B = base(torch.float32, HeadTransform())
    layer = layer_of(number, torch.float32)
    layer.strength = 0.7
    found_BV = summed_logits([(layer, 0.7)], HeadTransform(), hidden_BD, entropy_B, logits_BV)
    assert torch.equal(found_BV, adapted_logits(layer, HeadTransform(), hidden_BD, entropy_B, logits_BV))


def test_no_layer_is_the_base():
    hidden_BD, logits_BV, entropy_B = base(torch.float32, HeadTransform())
    assert torch.equal(summed_logits([], HeadTransform(), hidden_BD, entropy_B, logits_BV), logits_BV)
