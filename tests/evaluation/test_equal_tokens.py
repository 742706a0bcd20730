"""Accuracy at equal tokens: by hand, against plain counting, and its intervals against those of single shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bias.evaluation.equal_tokens import LIMITS, at_limits, limits_of, right_within
from moe_bias.evaluation.samples import Sample
from moe_bias.evaluation.scores import scores
from moe_bias.evaluation.statistics import mean, means, share, shares


def sample(problem, arm="base", number=0, right=True, tokens=10, finished=True):
    return Sample(problem, arm, number, "correct" if right else "wrong", "1", tokens, finished, "text")


def test_a_curve_by_hand():
    base = {
        "p1": [sample("p1", tokens=10), sample("p1", tokens=30)],
        "p2": [sample("p2", tokens=20, right=False), sample("p2", tokens=40, finished=False)],
    }
    other = {"p1": [sample("p1", tokens=5)] * 2, "p2": [sample("p2", tokens=15), sample("p2", tokens=35)]}
    points = at_limits(other, base, [10, 20, 40])
    assert [point.limit for point in points] == [10, 20, 40]
    # p1 has both within 10; p2 none, then one of two, then both.
    assert [point.accuracy.value for point in points] == [0.5, 0.75, 1.0]
    # Means of min(tokens, L): (5 + 5 + 10 + 10) / 4, (5 + 5 + 15 + 20) / 4, (5 + 5 + 15 + 35) / 4.
    assert [point.tokens for point in points] == [7.5, 11.25, 15.0]
    # The base has 1/4 within 10 and 20 and 1/2 within 40: its right answer that was cut does not count.
    assert [point.change.value for point in points] == [0.25, 0.5, 0.5]
    assert [point.accuracy.value for point in at_limits(base, None, [10, 20, 40])] == [0.25, 0.25, 0.5]
    assert all(point.change is None for point in at_limits(base, None, [10]))


answers = st.tuples(st.booleans(), st.integers(1, 50), st.booleans())


@given(st.lists(st.lists(answers, min_size=1, max_size=4), min_size=1, max_size=6), st.lists(st.integers(1, 60)))
def test_a_curve_is_plain_counting(drawn, limits):
    arm = {
        str(n): [sample(str(n), right=right, tokens=tokens, finished=ended) for right, tokens, ended in group]
        for n, group in enumerate(drawn)
    }
    found = right_within(arm, limits)
    for row, group in zip(found, drawn, strict=True):
        for value, limit in zip(row, limits, strict=True):
            counted = sum(right and ended and tokens <= limit for right, tokens, ended in group)
            assert value == pytest.approx(counted / len(group))


def test_limits_reach_the_longest_answer_of_any_arm():
    one, other = {"p": [sample("p", tokens=100)]}, {"p": [sample("p", tokens=480)]}
    limits = limits_of([one, other])
    assert len(limits) == LIMITS
    assert (limits[0], limits[-1]) == (20, 480)
    assert limits_of([{"p": [sample("p", tokens=5)]}]) == [1, 2, 3, 4, 5]
    assert limits_of([one, {"p": [sample("p", tokens=None)]}]) == limits_of([]) == []


@settings(max_examples=15, deadline=None)  # each draws 4,000 times
@given(st.integers(2, 40), st.integers(0, 9))
def test_intervals_of_many_columns_are_those_of_each(problems, seed):
    values_PL = np.random.default_rng(problems).choice([0.0, 0.5, 1.0], (problems, 3))
    values_PL[:, 2] = 0.0
    for single, together in ((mean, means), (share, shares)):
        for column_P, estimate in zip(values_PL.T, together(values_PL, seed), strict=True):
            expected = single(column_P, seed)
            assert vars(estimate) == pytest.approx(vars(expected), abs=1e-9)


def test_intervals_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values_PL = np.random.default_rng(0).random((30, 2))
    whole = means(values_PL)
    monkeypatch.setattr("moe_bias.evaluation.statistics._DRAWN", 900)
    assert means(values_PL) == whole


def test_scores_have_equal_tokens_shares_of_tokens_and_changes_of_pass_at_k():
    lengths = {"base": (10, 40), "short": (5, 20)}
    right = {"base": [(1, 0), (0, 0)], "short": [(1, 1), (1, 0)]}
    samples = [
        sample(f"p{problem}", arm, n, bool(value), tokens=lengths[arm][n])
        for arm, groups in right.items()
        for problem, group in enumerate(groups)
        for n, value in enumerate(group)
    ]
    base, short = scores(samples, ["base", "short"], {})
    assert base.token_share is None
    assert short.token_share.value == 0.5
    assert (short.token_share.low, short.token_share.high) == (0.5, 0.5)
    assert short.changes["pass@2"]["base"].value == 0.5
    assert base.at_limits[-1].accuracy.value == base.accuracy.value == 0.25
    assert short.at_limits[-1].change == short.change["base"]
    ten = next(point for point in short.at_limits if point.limit == 10)
    assert ten.accuracy.value == 0.5
    untold = [sample("p1", "base", tokens=None), sample("p2", "base", tokens=None)]
    (score,) = scores(untold, ["base"], {})
    assert (score.at_limits, score.token_share) == (None, None)
