import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import HIDDEN, VOCABULARY, tiny_model
from moe_bias.backbone import find_head
from moe_bias.features.extract import HiddenTokens, with_scalars
from moe_bias.features.grown import grown

HEADS = {name: find_head(tiny_model(name))[1] for name in ("llama", "gemma2")}


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(VOCABULARY)), sizes=st.tuples(st.integers(1, 96), st.integers(0, 96)))
def test_features_on_a_grown_support_are_those_made_on_it(name, order, sizes):
    head, (first, more) = HEADS[name], sizes
    support = order[: min(first + more, VOCABULARY)]
    generator = torch.Generator().manual_seed(first)
    hidden_TD = 3 * torch.randn(11, HIDDEN, generator=generator)
    token_T = torch.tensor(support)[torch.randint(len(support), (11,), generator=generator)]
    tokens = HiddenTokens(hidden_TD, token_T, torch.zeros_like(token_T))
    found = grown(with_scalars(head, tokens, support[:first], ""), head, torch.tensor(support))
    wanted = with_scalars(head, tokens, support, "")
    assert torch.equal(found.column, wanted.column)
    assert torch.equal(found.support, wanted.support)
    if len(support) == VOCABULARY:
        assert torch.equal(found.rest.log_sum_exp, wanted.rest.log_sum_exp)
        return
    torch.testing.assert_close(found.rest.log_sum_exp, wanted.rest.log_sum_exp, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.rest.mean_logit, wanted.rest.mean_logit, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(VOCABULARY)), sizes=st.tuples(*[st.integers(1, 30)] * 3))
def test_features_on_a_support_that_tokens_come_to_and_go_from_are_those_made_on_it(name, order, sizes):
    head, (gone, stay, come) = HEADS[name], sizes
    before, after = order[: gone + stay], order[gone : gone + stay + come]
    generator = torch.Generator().manual_seed(gone)
    hidden_TD = 3 * torch.randn(11, HIDDEN, generator=generator)
    token_T = torch.randint(VOCABULARY, (11,), generator=generator)
    tokens = HiddenTokens(hidden_TD, token_T, torch.zeros_like(token_T))
    found = grown(with_scalars(head, tokens, before, ""), head, torch.tensor(after))
    wanted = with_scalars(head, tokens, after, "")
    assert torch.equal(found.column, wanted.column)
    assert torch.equal(found.support, wanted.support)
    torch.testing.assert_close(found.rest.log_sum_exp, wanted.rest.log_sum_exp, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.rest.mean_logit, wanted.rest.mean_logit, rtol=1e-4, atol=1e-3)


def test_what_dominates_the_rest_is_taken_out_without_losing_digits():
    """The token that comes has all of the rest but one part in a million."""
    head = HEADS["llama"]
    weight_VD = head.module.weight.detach()
    hidden_TD = 100 * weight_VD[[50]] / weight_VD[50].norm()
    token_T = torch.tensor([50])
    tokens = HiddenTokens(hidden_TD, token_T, torch.zeros_like(token_T))
    before = with_scalars(head, tokens, [3, 4], "")
    logits_V = head.logits(hidden_TD)[0]
    assert float(logits_V[50] - logits_V.topk(2).values[1]) > 10
    found = grown(before, head, torch.tensor([3, 4, 50]))
    wanted = with_scalars(head, tokens, [3, 4, 50], "")
    torch.testing.assert_close(found.rest.log_sum_exp, wanted.rest.log_sum_exp, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.rest.mean_logit, wanted.rest.mean_logit, rtol=1e-6, atol=1e-5)
