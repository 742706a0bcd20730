"""Answers of several policies: greedy ones against `greedy`, samples against the plain distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from helpers.models import VOCABULARY, randomise, tiny_model
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig
from moe_bias.features.extract import run_backbone
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import meter
from moe_bias.rollout.answers import AnswerChoices, greedy_answers, sampled_answers
from moe_bias.rollout.draw import nucleus
from moe_bias.rollout.policy import base_policy, layer_policy
from moe_bias.tasks.conversations import Example

PROMPTS = [[5, 6, 7, 8], [9], [30, 31, 32]]
STOP = [2]


def stage():
    model = tiny_model()
    head = find_head(model)[1]
    layer = MoEBiasLayer(
        LayerConfig(experts="free", num_experts=4, support=tuple(range(2, 60))), head.hidden_size, head.vocab_size
    )
    randomise(layer)
    return model, head, layer_policy(layer, head.transform)


def answered(prompts, policies, seeds, model, head, **changes):
    choices = {"samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6, "stop_ids": STOP, **changes}
    with meter("test", 1, "answers", visible=False) as bar:
        return sampled_answers(model, head, prompts, policies, AnswerChoices(**choices), seeds, bar)


def test_greedy_answers_are_those_of_the_greedy_sampler():
    model, head, adapted = stage()
    policies = [base_policy, adapted]
    found = answered(PROMPTS, policies, [0, 1, 2], model, head, samples=1, temperature=0.0)
    expected = greedy_answers(model, head, PROMPTS, policies, stop_ids=STOP, max_new_tokens=6, batch_size=3)
    assert [[column[p] for column in expected] for p in range(3)] == [[group[0] for group in row] for row in found]


def test_samples_follow_from_the_problems_seed_alone_and_are_shared_by_policies():
    model, head, adapted = stage()
    together = answered(PROMPTS, [base_policy, adapted], [4, 5, 6], model, head)
    alone = answered(PROMPTS[1:2], [adapted], [5], model, head)
    assert together[1][1] == alone[0][0]
    assert answered(PROMPTS[1:2], [adapted], [7], model, head) != alone
    twice = answered(PROMPTS, [base_policy, base_policy], [4, 5, 6], model, head)
    assert all(first == second for first, second in twice)
    assert any(first != second for first, second in together)
    assert len({tuple(answer.token_ids) for answer in together[0][0]}) > 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6)])
def test_first_tokens_are_distributed_as_the_policys_nucleus(temperature, top_p):
    model, head, adapted = stage()
    choices = {"samples": 4000, "max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
    ((answers,),) = answered(PROMPTS[:1], [adapted], [3], model, head, **choices)
    hidden_TD = run_backbone(model, [Example(PROMPTS[0], [8])], 1, "test").hidden
    with torch.no_grad():
        probs_V = (adapted(hidden_TD, head.logits(hidden_TD))[0] / temperature).double().softmax(-1)
    order_V = probs_V.argsort(descending=True)
    size = next(n for n in range(1, VOCABULARY + 1) if probs_V[order_V[:n]].sum() >= top_p or n == VOCABULARY)
    kept_V = torch.zeros_like(probs_V).index_copy(0, order_V[:size], probs_V[order_V[:size]])
    tokens = torch.tensor([(answer.token_ids or STOP)[0] for answer in answers])
    counts_V = tokens.bincount(minlength=VOCABULARY).double()
    assert counts_V[kept_V == 0].sum() == 0
    expected_V = kept_V / kept_V.sum() * 4000
    common_V = expected_V >= 5
    observed = [*counts_V[common_V].tolist(), float(counts_V[~common_V].sum()) + 1e-9]
    expected = [*expected_V[common_V].tolist(), float(expected_V[~common_V].sum()) + 1e-9]
    assert sum(common_V) > 3
    assert chisquare(observed, expected).pvalue > 0.01


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12), st.floats(0.01, 1))
def test_nucleus_is_the_fewest_tokens_that_hold_the_mass(logits, top_p):
    logits_V = torch.tensor(logits)
    kept_V = nucleus(logits_V[None], top_p)[0]
    is_kept_V = torch.isfinite(kept_V)
    assert torch.equal(kept_V[is_kept_V], logits_V[is_kept_V])
    probs_V = logits_V.double().softmax(-1)
    kept = probs_V[is_kept_V].sort(descending=True).values
    assert kept.sum() >= top_p - 1e-9
    assert kept[:-1].sum() < top_p
    if not is_kept_V.all():
        assert kept.min() >= probs_V[~is_kept_V].max()
