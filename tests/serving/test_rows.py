"""Moving the rows of a mixed batch, against each row by itself."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import HIDDEN, VOCABULARY, randomise
from moe_bias.backbone import HeadTransform, OutputRows
from moe_bias.combined import summed_logits
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.serving.rows import AskedAdapter, Tenant, move_rows, rows_by_tenant

CONFIGS = (
    LayerConfig(experts="free", num_experts=5, support=(0, 7, 96)),
    LayerConfig(experts="linear", expert_rank=2, free_entries=True, num_experts=3, support=(0, 7, 96)),
    LayerConfig(experts="directions", num_experts=1, top_k=1, support=(0, 7, 96), reach="vocabulary"),
    LayerConfig(experts="free", num_experts=1, top_k=1, entropy_gate=False),
)
EMBEDDING = torch.nn.Linear(HIDDEN, VOCABULARY)


def tenants(strengths=(1.0, 0.3)):
    made = []
    for number, config in enumerate(CONFIGS):
        layer = MoEBiasLayer(config, HIDDEN, VOCABULARY, OutputRows(EMBEDDING)).double().requires_grad_(False)
        randomise(layer, seed=number)
        made += [Tenant((AskedAdapter(Path(str(number)), strength, layer),)) for strength in strengths]
    return made


def together(tenants):
    return Tenant(tuple(adapter for tenant in tenants for adapter in tenant.adapters))


def batch(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_BD = torch.randn(rows, HIDDEN, dtype=torch.float64, generator=generator)
    return hidden_BD, 3 * torch.randn(rows, VOCABULARY, dtype=torch.float64, generator=generator)


several = st.lists(st.integers(0, 2 * len(CONFIGS) - 1), min_size=1, max_size=3)


@given(
    whose=st.lists(st.one_of(st.none(), several), min_size=1, max_size=9),
    cap=st.sampled_from([None, 5.0]),
)
def test_a_mixed_batch_is_each_row_by_itself(whose, cap):
    made, transform = tenants(), HeadTransform(cap=cap)
    hidden_BD, raw_BV = batch(len(whose))
    logits_BV = transform.apply(raw_BV)
    moved_BV = logits_BV.clone()
    asked = [None if numbers is None else together(made[number] for number in numbers) for numbers in whose]
    here = {row: tenant for row, tenant in enumerate(asked) if tenant is not None}
    move_rows(moved_BV, hidden_BD, rows_by_tenant(here, torch.device("cpu")), transform)
    for row, tenant in enumerate(asked):
        if tenant is None:
            assert torch.equal(moved_BV[row], logits_BV[row])
            continue
        one = slice(row, row + 1)
        entropy_B = entropy_from_logits(logits_BV[one])
        expected = summed_logits(tenant.parts, transform, hidden_BD[one], entropy_B, logits_BV[one])
        torch.testing.assert_close(moved_BV[one], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("numbers", [[0], [0, 5]])
def test_masked_tokens_stay_masked_and_the_entropy_is_the_unmasked_one(cap, numbers):
    transform = HeadTransform(cap=cap)
    hidden_BD, raw_BV = batch(3)
    logits_BV = transform.apply(raw_BV)
    asked = together(tenants()[number] for number in numbers)
    entropy_B, groups = entropy_from_logits(logits_BV), rows_by_tenant({1: asked}, torch.device("cpu"))
    expected_BV = logits_BV.clone()
    move_rows(expected_BV, hidden_BD, groups, transform)
    masked_BV = logits_BV.clone()
    masked_BV[:, ::2] = -torch.inf
    move_rows(masked_BV, hidden_BD, groups, transform, entropy_B)
    assert torch.equal(masked_BV[:, 1::2], expected_BV[:, 1::2])
    assert (masked_BV[:, ::2] == -torch.inf).all()


def test_the_same_version_at_the_same_strength_is_one_piece_of_work():
    one, weaker, other, *_ = tenants()
    groups = rows_by_tenant({4: one, 0: other, 2: one, 3: weaker}, torch.device("cpu"))
    assert [(group.tenant, group.row_R.tolist()) for group in groups] == [(other, [0]), (one, [2, 4]), (weaker, [3])]


def test_half_precision_logits_are_rounded_once():
    hidden_BD, logits_BV = batch(2)
    half_BV = logits_BV.bfloat16()
    layer = tenants()[0].adapters[0].layer.float()
    groups = rows_by_tenant({0: Tenant((AskedAdapter(Path("0"), 1.0, layer),))}, torch.device("cpu"))
    moved_BV = half_BV.clone()
    move_rows(moved_BV, hidden_BD.bfloat16(), groups, HeadTransform())
    wide_BV = half_BV.float()
    move_rows(wide_BV, hidden_BD.bfloat16(), groups, HeadTransform())
    assert torch.equal(moved_BV, wide_BV.bfloat16())
