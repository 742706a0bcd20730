"""Both divergences from a target, from the support's columns and scalars, against the whole vocabulary in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bias.divergence import (
    Draft,
    acceptance,
    divergences_and_gradient,
    full_divergences,
    target_scalars,
)
from moe_bias.features.extract import support_columns
from moe_bias.support import full_log_prob, rest_scalars


@st.composite
def problems(draw):
    """Random logits of two models at a temperature, a support and a move of it, in float64."""
    vocabulary = draw(st.integers(2, 41))
    size = draw(st.one_of(st.just(1), st.just(vocabulary), st.integers(1, vocabulary)))
    tokens = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
    offset = draw(st.sampled_from([0.0, 1e4]))
    temperature = draw(st.sampled_from([0.5, 1.0, 1.7]))

    def logits(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    support_M = torch.randperm(vocabulary, generator=generator)[:size]
    token_T = torch.randint(0, vocabulary, (tokens,), generator=generator)
    target_TV, draft_TV = ((offset + logits(tokens, vocabulary)) / temperature for _ in range(2))
    return target_TV, draft_TV, logits(tokens, size) / temperature, support_M, token_T


def draft_of(logits_TV, support_M, token_T):
    return Draft(
        logits_TV.gather(-1, token_T[:, None]).squeeze(-1),
        support_columns(support_M, logits_TV.shape[-1])[token_T],
        rest_scalars(logits_TV, support_M),
        logits_TV.double().logsumexp(-1),
    )


def reduced(target_TV, logits_TV, move_TM, support_M, token_T):
    return divergences_and_gradient(
        logits_TV[:, support_M] + move_TM,
        draft_of(logits_TV, support_M, token_T),
        target_TV[:, support_M].clone(),
        target_scalars(target_TV, logits_TV, support_M),
    )


@settings(max_examples=150, deadline=None)
@given(problems())
def test_divergences_and_their_gradients_are_those_of_the_whole_vocabulary(problem):
    target_TV, logits_TV, move_TM, support_M, token_T = problem
    move_TM.requires_grad_()
    wanted = full_divergences(target_TV, logits_TV, move_TM, support_M)
    log_prob_T = full_log_prob(logits_TV, move_TM, support_M, token_T)
    numbers, gradient_of = reduced(target_TV, logits_TV, move_TM.detach(), support_M, token_T)
    for found_T, wanted_T in zip(numbers, (log_prob_T, wanted.forward, wanted.reverse), strict=True):
        torch.testing.assert_close(found_T, wanted_T.detach(), rtol=1e-8, atol=1e-8)
    weights = [torch.linspace(-1, 2, len(token_T), dtype=torch.float64) + shift for shift in (0.0, 0.5, 1.5)]
    total = sum((w * n).sum() for w, n in zip(weights, (log_prob_T, wanted.forward, wanted.reverse), strict=True))
    (expected_TM,) = torch.autograd.grad(total, move_TM)
    torch.testing.assert_close(gradient_of(weights), expected_TM, rtol=1e-7, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_acceptance_is_a_share_that_pinsker_bounds(problem):
    target_TV, logits_TV, move_TM, support_M, _ = problem
    policy_TV = logits_TV.index_add(-1, support_M, move_TM)
    found_T, both = acceptance(target_TV, policy_TV), full_divergences(target_TV, logits_TV, move_TM, support_M)
    p_TV, pi_TV = target_TV.softmax(-1), policy_TV.softmax(-1)
    torch.testing.assert_close(found_T, 1 - 0.5 * (p_TV - pi_TV).abs().sum(-1), rtol=1e-9, atol=1e-9)
    for divergence_T in (both.forward, both.reverse):
        assert (1 - found_T <= (divergence_T / 2).clamp(min=0).sqrt() + 1e-7).all()
    torch.testing.assert_close(acceptance(target_TV, target_TV), torch.ones(len(target_TV), dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.0, 20.0, 1e3])
def test_float32_is_as_near_to_float64_as_the_plain_formula_in_float32(scale):
    """Logits as large as models have them, on a support of a tenth."""
    generator = torch.Generator().manual_seed(0)
    target_TV, logits_TV = (scale + 4 * torch.randn(64, 999, generator=generator) for _ in range(2))
    support_M, token_T = torch.arange(0, 999, 10), torch.randint(0, 999, (64,), generator=generator)
    move_TM = torch.randn(64, 100, generator=generator)
    exact = full_divergences(target_TV.double(), logits_TV.double(), move_TM.double(), support_M)
    plain = full_divergences(target_TV, logits_TV, move_TM, support_M)
    numbers, _ = reduced(target_TV, logits_TV, move_TM, support_M, token_T)
    for found_T, plain_T, exact_T in zip(
        numbers[1:], (plain.forward, plain.reverse), (exact.forward, exact.reverse), strict=True
    ):
        assert found_T.dtype == torch.float32
        allowed = float((plain_T - exact_T).abs().max()) + 1e-6 * (1 + float(exact_T.abs().max()))
        assert float((found_T - exact_T).abs().max()) <= allowed


def test_a_draft_that_is_the_target_is_at_no_distance():
    generator = torch.Generator().manual_seed(0)
    logits_TV = 5 * torch.randn(9, 31, generator=generator)
    support_M, token_T = torch.arange(4), torch.zeros(9, dtype=torch.int64)
    numbers, gradient_of = reduced(logits_TV, logits_TV, torch.zeros(9, 4), support_M, token_T)
    for divergence_T in numbers[1:]:
        torch.testing.assert_close(divergence_T, torch.zeros(9), rtol=0, atol=1e-6)
    ones_T = torch.ones(9)
    torch.testing.assert_close(gradient_of([torch.zeros(9), ones_T, ones_T]), torch.zeros(9, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("excluded", [0, 20])
def test_a_token_that_one_model_excludes_leaves_numbers_finite(excluded):
    """Token 0 is on the support, token 20 is off it."""
    generator = torch.Generator().manual_seed(0)
    target_TV, logits_TV = (torch.randn(3, 31, generator=generator) for _ in range(2))
    target_TV[:, excluded] = -math.inf
    support_M, token_T = torch.arange(9), torch.ones(3, dtype=torch.int64)
    numbers, gradient_of = reduced(target_TV, logits_TV, torch.zeros(3, 9), support_M, token_T)
    assert all(torch.isfinite(number).all() for number in numbers)
    assert (numbers[2] > numbers[1] + 10).all()  # the draft still says what the target never would
    assert torch.isfinite(gradient_of([torch.ones(3)] * 3)).all()
