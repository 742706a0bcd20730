import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_bias import support
from moe_bias.chunks import AtOnce
from moe_bias.layer import entropy_from_logits
from moe_bias.support import (
    BaseScalars,
    PolicyStats,
    RestScalars,
    base_scalars,
    choose_support,
    coverage,
    fork_mass,
    fork_threshold,
    full_log_prob,
    full_stats,
    reduced_log_partition,
    reduced_log_prob,
    reduced_stats,
    rest_mask,
    rest_scalars,
    split_vocabulary,
)

quick = settings(max_examples=60, deadline=None)
STATS = ("log_partition", "entropy", "kl")


@dataclass(frozen=True)
class Case:
    """Base logits (T, V), a support (M,), its move (T, M) and the realised tokens (T,), in float32."""

    logits_TV: Tensor
    support_M: Tensor
    move_TM: Tensor
    token_T: Tensor

    def log_prob(self, move_TM: Tensor | None = None) -> Tensor:
        """By the reduced softmax."""
        column_V = torch.full((self.logits_TV.shape[-1],), -1)
        column_V[self.support_M] = torch.arange(len(self.support_M))
        return reduced_log_prob(
            self.logits_TV.gather(-1, self.token_T[:, None]).squeeze(-1),
            column_V[self.token_T],
            self.logits_TV[:, self.support_M],
            self.move_TM if move_TM is None else move_TM,
            rest_scalars(self.logits_TV, self.support_M),
        )

    def stats(self, move_TM: Tensor | None = None) -> PolicyStats:
        """By the reduced softmax."""
        rest = rest_scalars(self.logits_TV, self.support_M)
        return reduced_stats(self.logits_TV[:, self.support_M], self.move_TM if move_TM is None else move_TM, rest)

    def double(self) -> "Case":
        """The same numbers in float64."""
        return Case(self.logits_TV.double(), self.support_M, self.move_TM.double(), self.token_T)

    def reference_log_prob(self) -> Tensor:
        return full_log_prob(self.logits_TV, self.move_TM, self.support_M, self.token_T)

    def reference_stats(self) -> PolicyStats:
        return full_stats(self.logits_TV, self.move_TM, self.support_M)


ADVERSE = ("huge", "lowered", "one token", "impossible", "even move", "cancelling move")


@st.composite
def cases(draw) -> Case:
    """Random and adversarial logits: any M from 1 to V, logits of 1e4 mixed with small ones, -inf entries."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    tokens, vocab_size = draw(st.integers(1, 8)), draw(st.integers(1, 300))
    size = draw(st.sampled_from([1, vocab_size]) | st.integers(1, vocab_size))
    support_M = torch.randperm(vocab_size)[:size]
    logits_TV = torch.randn(tokens, vocab_size) * draw(st.sampled_from([0.0, 1.0, 10.0, 1e3, 1e4]))
    move_TM = torch.randn(tokens, size) * draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
    for kind in draw(st.lists(st.sampled_from(ADVERSE), max_size=3, unique=True)):
        make_adverse(kind, logits_TV, support_M, move_TM)
    return Case(logits_TV, support_M, move_TM, torch.randint(vocab_size, (tokens,)))


def make_adverse(kind: str, logits_TV: Tensor, support_M: Tensor, move_TM: Tensor) -> None:
    vocab_size = logits_TV.shape[-1]
    if kind == "huge":
        logits_TV[:, torch.randint(vocab_size, (3,))] += 1e4
    elif kind == "lowered":
        logits_TV -= 1e4
    elif kind == "one token":
        logits_TV[:, torch.randint(vocab_size, (1,))] += 1e5
    elif kind == "impossible":
        logits_TV[:, torch.randperm(vocab_size)[: vocab_size // 3]] = -math.inf
    elif kind == "even move":
        move_TM += 50
    elif kind == "cancelling move":
        move_TM -= logits_TV[:, support_M].round().nan_to_num(neginf=0)


def assert_as_good_as_naive(found: Tensor, naive: Tensor, exact: Tensor) -> None:
    """Error at most that of naive float32 plus 1e-6 relative, quantities below one nat counting as one nat."""
    assert torch.equal(found.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    error, naive_error = (found - exact)[finite].abs(), (naive - exact)[finite].abs()
    allowed = naive_error + 1e-6 * exact[finite].abs().clamp(min=1)
    assert (error <= allowed).all(), (error, naive_error, exact)


@quick
@given(cases())
def test_log_prob_is_as_good_as_the_full_softmax(case):
    assert_as_good_as_naive(case.log_prob(), case.reference_log_prob(), case.double().reference_log_prob())


@quick
@given(cases())
def test_stats_are_as_good_as_the_full_softmax(case):
    found, naive, exact = case.stats(), case.reference_stats(), case.double().reference_stats()
    for name in STATS:
        assert_as_good_as_naive(getattr(found, name), getattr(naive, name), getattr(exact, name))


@quick
@given(cases())
def test_in_float64_both_ways_are_one(case):
    case = case.double()
    torch.testing.assert_close(case.log_prob(), case.reference_log_prob(), rtol=1e-9, atol=1e-9)
    found, expected = case.stats(), case.reference_stats()
    for name in STATS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


@quick
@given(cases())
def test_log_prob_and_partition_agree(case):
    shift_T, relative_T = reduced_log_partition(
        case.logits_TV[:, case.support_M], case.move_TM, rest_scalars(case.logits_TV, case.support_M)
    )
    assert shift_T.isfinite().all()
    torch.testing.assert_close(shift_T.double() + relative_T.double(), case.stats().log_partition)


def fast_scalars(logits_TV: Tensor, support_M: Tensor) -> BaseScalars:
    return base_scalars(logits_TV, split_vocabulary(support_M, logits_TV.shape[-1]))


def plain_scalars(logits_TV: Tensor, support_M: Tensor) -> BaseScalars:
    return BaseScalars(entropy_from_logits(logits_TV), logits_TV.logsumexp(-1), rest_scalars(logits_TV, support_M))


def assert_base_scalars_are_as_good(logits_TV: Tensor, support_M: Tensor) -> None:
    found, naive = fast_scalars(logits_TV, support_M), plain_scalars(logits_TV, support_M)
    exact = plain_scalars(logits_TV.double(), support_M)
    assert_as_good_as_naive(found.entropy, naive.entropy, exact.entropy)
    assert_as_good_as_naive(found.log_partition, naive.log_partition, exact.log_partition)
    for name in ("log_sum_exp", "mean_logit"):
        assert_as_good_as_naive(*(getattr(scalars.rest, name) for scalars in (found, naive, exact)))


@quick
@given(cases(), st.sampled_from([1, 2**18]))
def test_base_scalars_are_as_good_as_the_plain_ones(case, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "PIECE", AtOnce(piece, piece))
        assert_base_scalars_are_as_good(case.logits_TV, case.support_M)


@quick
@given(cases())
def test_base_scalars_in_float64_are_the_plain_ones(case):
    found, expected = (of(case.logits_TV.double(), case.support_M) for of in (fast_scalars, plain_scalars))
    tight = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.entropy, expected.entropy, **tight)
    torch.testing.assert_close(found.log_partition, expected.log_partition, **tight)
    torch.testing.assert_close(found.rest.log_sum_exp, expected.rest.log_sum_exp, **tight)
    torch.testing.assert_close(found.rest.mean_logit, expected.rest.mean_logit, **tight)


@pytest.mark.parametrize("lower", [20.0, 90.0, 200.0, 1e4])
def test_base_scalars_of_a_rest_of_next_to_no_mass(lower):
    # From 104 nats below the largest, float32 knows no exp of the rest: only its own shift keeps R and A.
    logits_TV = torch.randn(4, 300)
    logits_TV[:, 10:] -= lower
    assert_base_scalars_are_as_good(logits_TV, torch.arange(10))
    assert_base_scalars_are_as_good(logits_TV, torch.arange(10, 300))


def test_base_scalars_of_half_precision_are_summed_in_float32():
    logits_TV, support_M = torch.randn(4, 5000).bfloat16(), torch.arange(50)
    found, expected = fast_scalars(logits_TV, support_M), fast_scalars(logits_TV.float(), support_M)
    assert torch.equal(found.entropy, expected.entropy)
    assert torch.equal(found.rest.log_sum_exp, expected.rest.log_sum_exp)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits_TV, support_M = torch.randn(4, 50).to(dtype), torch.arange(5)
    move_TM = torch.randn(4, 5)
    rest, exact_rest = rest_scalars(logits_TV, support_M), rest_scalars(logits_TV.double(), support_M)
    found = reduced_stats(logits_TV[:, :5], move_TM, rest)
    exact = reduced_stats(logits_TV[:, :5].double(), move_TM.double(), exact_rest)
    assert found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.kl.double(), exact.kl, rtol=1e-6, atol=1e-6)


def test_by_hand():
    # u = ln (1, 2, 3, 4), the support is {2, 0}: R = ln (2 + 4) = ln 6, A = (2 ln 2 + 4 ln 4) / 6.
    # d = ln 2 on token 0, ln 1/3 on token 2: weights (2, 2, 1, 4), so Z' = 9.
    logits_TV = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).log()
    move_TM = torch.tensor([[1 / 3, 2.0]], dtype=torch.float64).log()
    case = Case(logits_TV, torch.tensor([2, 0]), move_TM, torch.tensor([0]))
    rest = rest_scalars(case.logits_TV, case.support_M)
    assert float(rest.log_sum_exp) == pytest.approx(math.log(6))
    assert float(rest.mean_logit) == pytest.approx((2 * math.log(2) + 4 * math.log(4)) / 6)
    assert float(case.log_prob()) == pytest.approx(math.log(2 / 9))
    stats = case.stats()
    assert float(stats.log_partition) == pytest.approx(math.log(9))
    # H = ln 9 - (2 ln 2 + 2 ln 2 + 4 ln 4) / 9 = ln 9 - 12/9 ln 2.
    assert float(stats.entropy) == pytest.approx(math.log(9) - 12 / 9 * math.log(2))
    # KL = (2 ln 2 + 1 ln 1/3) / 9 - ln (9 / 10).
    assert float(stats.kl) == pytest.approx((2 * math.log(2) - math.log(3)) / 9 - math.log(0.9))


def test_kl_of_no_move_is_zero():
    case = Case(torch.randn(5, 40) * 100, torch.arange(10), torch.zeros(5, 10), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(case.stats().kl, torch.zeros(5))


def test_kl_of_the_same_move_everywhere_is_zero():
    case = Case(torch.randn(5, 40), torch.arange(40), torch.full((5, 40), 321.5), torch.zeros(5, dtype=torch.int64))
    assert case.stats().kl.abs().max() <= 1e-6


def test_move_that_cancels_a_huge_logit():
    # -9999.123 + 9999 is exact in float32, but -9999.123 - 5.3 is not.
    case = Case(torch.tensor([[-9999.123, 5.3, 0.0]]), torch.tensor([0]), torch.tensor([[9999.0]]), torch.tensor([0]))
    assert_as_good_as_naive(case.log_prob(), case.reference_log_prob(), case.double().reference_log_prob())


def test_probability_of_a_certain_token_is_not_above_one():
    # At 1e4 neighbouring float32 numbers are 1e-3 apart, so u + d is u: only in float64 do they cancel.
    logits_TV = torch.tensor([[1e4, 0.0]])
    case = Case(logits_TV, torch.tensor([0]), torch.tensor([[3e-4]]), torch.tensor([0]))
    assert float(case.log_prob()) == 0


@pytest.mark.parametrize("shape", ["some", "one column", "whole vocabulary", "empty support"])
def test_gradients_are_those_of_finite_differences(shape):
    torch.manual_seed(0)
    size = {"some": 3, "one column": 1, "whole vocabulary": 7, "empty support": 2}[shape]
    case = Case(
        torch.randn(4, 7, dtype=torch.float64),
        torch.randperm(7)[:size],
        torch.randn(4, size, dtype=torch.float64, requires_grad=True),
        torch.randint(7, (4,)),
    )
    if shape == "empty support":
        case.logits_TV[:, case.support_M] = -math.inf
        case.token_T.fill_(int(rest_mask(case.support_M, 7).nonzero()[0]))
    assert torch.autograd.gradcheck(case.log_prob, case.move_TM)
    for name in STATS:
        assert torch.autograd.gradcheck(lambda move_TM, name=name: getattr(case.stats(move_TM), name), case.move_TM)


@quick
@given(cases())
def test_gradients_are_finite(case):
    move_TM = case.move_TM.requires_grad_()
    stats = case.stats(move_TM)
    log_prob_T = case.log_prob(move_TM)
    for output_T in (log_prob_T[log_prob_T.isfinite()], stats.entropy, stats.kl, stats.log_partition):
        (gradient_TM,) = torch.autograd.grad(output_T.sum(), move_TM, retain_graph=True)
        assert gradient_TM.isfinite().all()


def test_scalars_of_an_empty_rest():
    rest = rest_scalars(torch.randn(3, 5), torch.arange(5))
    assert rest.log_sum_exp.isneginf().all()
    assert torch.equal(rest.mean_logit, torch.zeros(3, dtype=torch.float64))


def test_scalars_of_an_impossible_rest_are_those_of_an_empty_one():
    logits_TV = torch.zeros(3, 5)
    logits_TV[:, 2:] = -math.inf
    rest = rest_scalars(logits_TV, torch.tensor([0, 1]))
    assert rest.log_sum_exp.isneginf().all()
    assert torch.equal(rest.mean_logit, torch.zeros(3, dtype=torch.float64))


def test_scalars_keep_float64_of_float32_logits():
    rest = rest_scalars(torch.full((1, 3), 1e4), torch.tensor([0]))
    assert rest.log_sum_exp.dtype == rest.mean_logit.dtype == torch.float64
    # Two logits of 1e4: R = 1e4 + ln 2 to float32's precision of ln 2, not of 1e4.
    assert float(rest.log_sum_exp) - 1e4 == pytest.approx(math.log(2), abs=1e-7)


def test_scalars_of_no_tokens():
    rest = rest_scalars(torch.empty(0, 5), torch.tensor([1]))
    assert isinstance(rest, RestScalars)
    assert rest.log_sum_exp.shape == rest.mean_logit.shape == (0,)


@pytest.mark.parametrize(
    ("entropy", "rho", "threshold"),
    [
        ([5, 1, 4, 2, 3], 0.2, 5),
        ([5, 1, 4, 2, 3], 0.4, 4),
        ([5, 1, 4, 2, 3], 0.3, 4),  # 1.5 tokens are rounded up to 2
        ([5, 1, 4, 2, 3], 1.0, 1),
        ([2, 2, 2, 1, 0], 0.2, 2),  # a tie: all three are forks
        ([3], 0.2, 3),
        (list(range(100)), 0.07, 93),  # 0.07 * 100 is 7.000000000000001 in floating point
    ],
)
def test_fork_threshold(entropy, rho, threshold):
    assert fork_threshold(torch.tensor(entropy, dtype=torch.float32), rho) == threshold


@quick
@given(st.integers(1, 60), st.integers(1, 20))
def test_fork_threshold_is_the_quantile(tokens, twentieths):
    entropy_T = torch.randperm(tokens, dtype=torch.float64)
    forks = int((entropy_T >= fork_threshold(entropy_T, twentieths / 20)).sum())
    assert forks == -(-tokens * twentieths // 20)


def test_fork_threshold_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no tokens to take the entropy threshold over"):
        fork_threshold(torch.empty(0))
    with pytest.raises(ValueError, match="`rho` is 0, a share of the tokens"):
        fork_threshold(torch.ones(3), 0)


def test_fork_mass_counts_forks_only():
    # Entropies 0, ln 2 and ln 3: at a threshold of ln 2 the first position is left out.
    logits_TV = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    mass_V = fork_mass(logits_TV, math.log(2) - 1e-6)
    expected_V = torch.tensor([1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(mass_V, expected_V, rtol=1e-6, atol=0)


def test_choose_support_takes_the_largest_mass():
    mass_V = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.2])
    assert choose_support(mass_V, 2) == [1, 3]
    assert choose_support(mass_V, 3, always=[2]) == [1, 2, 3]
    assert choose_support(mass_V, 5) == [0, 1, 2, 3, 4]
    assert torch.equal(mass_V, torch.tensor([0.1, 0.5, 0.0, 0.3, 0.2]))


def test_choose_support_takes_lower_ids_of_a_tie():
    assert choose_support(torch.zeros(1000), 3, always=[999]) == [0, 1, 999]


@quick
@given(st.data())
def test_chosen_support_covers_most(data):
    vocab_size = data.draw(st.integers(1, 50))
    size = data.draw(st.integers(1, vocab_size))
    always = data.draw(st.sets(st.integers(0, vocab_size - 1), max_size=size))
    mass_V = torch.rand(vocab_size, dtype=torch.float64)
    support = choose_support(mass_V, size, always)
    assert len(set(support)) == size
    assert support == sorted(support)
    assert always <= set(support)
    best = float(mass_V.sort(descending=True).values[:size].sum() / mass_V.sum())
    assert coverage(mass_V, support) <= best + 1e-12
    if not always:
        assert coverage(mass_V, support) == pytest.approx(best)


@pytest.mark.parametrize(
    ("size", "always", "sentence"),
    [
        (6, [], "a support of 6 tokens does not fit a vocabulary of 5"),
        (0, [], "a support of 0 tokens does not fit a vocabulary of 5"),
        (1, [2, 3], "a support of 1 tokens cannot hold the 2 that must be in it"),
        (2, [5], "token id 5 is outside the vocabulary of 5 tokens"),
        (2, [-1], "token id -1 is outside the vocabulary of 5 tokens"),
    ],
)
def test_impossible_supports_are_refused(size, always, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose_support(torch.ones(5), size, always)


def test_coverage():
    mass_V = torch.tensor([1.0, 3.0, 4.0])
    assert coverage(mass_V, [1]) == pytest.approx(3 / 8)
    assert coverage(mass_V, [2, 0, 1]) == 1
    with pytest.raises(ValueError, match="no fork mass to cover"):
        coverage(torch.zeros(3), [1])
