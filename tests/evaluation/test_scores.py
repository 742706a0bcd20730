"""Scores of arms: pass@k and majority by enumeration, shares, groups, paired changes."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bias.evaluation.samples import Sample
from moe_bias.evaluation.scores import majority, pass_at, scores


def sample(problem, arm, number, answer, right, tokens=10, finished=True, outcome=None, text="text"):
    return Sample(problem, arm, number, outcome or ("correct" if right else "wrong"), answer, tokens, finished, text)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(right, data):
    k = data.draw(st.integers(1, len(right)))
    draws = list(combinations(right, k))
    expected = sum(any(drawn) for drawn in draws) / len(draws)
    assert pass_at(sum(right), len(right), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["5", "5", "4"], 1.0),
        (["5", "4", "4"], 0.0),
        (["5", "4"], 0.5),  # a tie, drawn by lot
        ([" 5", "5 ", "4", "4"], 0.5),  # spaces do not count
        ([None, None, "5"], 1.0),  # nothing read votes for nothing
        ([None, None], 0.0),
        (["5", "4", "3"], 1 / 3),
    ],
)
def test_majority(answers, expected):
    samples = [
        sample("p", "a", n, answer, (answer or "").strip() == "5", outcome=None if answer else "unparseable")
        for n, answer in enumerate(answers)
    ]
    assert majority(samples) == pytest.approx(expected)


def test_scores_of_two_arms_by_hand():
    right = {("p1", "base"): (1, 0), ("p2", "base"): (0, 0), ("p1", "other"): (1, 1), ("p2", "other"): (1, 0)}
    samples = [
        sample(problem, arm, n, str(value), bool(value), tokens=10 + n, finished=bool(value))
        for (problem, arm), values in right.items()
        for n, value in enumerate(values)
    ]
    base, other = scores(samples, ["base", "other"], {"level": {"1": ["p1", "p2"], "2": ["p1"]}})
    assert base.accuracy.value == 0.25  # (1/2 + 0) / 2
    assert other.accuracy.value == 0.75
    assert other.change["base"].value == 0.5
    assert base.change == {}
    assert base.pass_at["2"].value == 0.5
    assert other.pass_at["2"].value == 1
    assert other.majority is not None
    assert other.majority.value == 0.75  # p2 is a tie
    assert (base.cut, other.cut) == (0.75, 0.25)
    assert base.tokens is not None
    assert (base.tokens.value, base.sampled_tokens) == (10.5, 42)
    assert list(other.groups["level"]) == ["1"]  # one problem has no interval
    assert other.groups["level"]["1"].problems == 2
    assert other.groups["level"]["1"].accuracy.value == 0.75


def test_loops_distinct_ngrams_and_their_changes_by_hand():
    loop, fresh = "go on " * 20, "so it is done now"
    texts = {("p1", "base"): (fresh, fresh), ("p2", "base"): (fresh, loop), ("p1", "it"): (loop, loop)}
    texts[("p2", "it")] = (loop, fresh)
    samples = [
        sample(problem, arm, n, "1", True, tokens=10 * (arm == "it") + n, finished=text is fresh, text=text)
        for (problem, arm), both in texts.items()
        for n, text in enumerate(both)
    ]
    base, it = scores(samples, ["base", "it"], {})
    assert (base.looping.value, it.looping.value) == (0.25, 0.75)  # (0 + 1/2) / 2, (1 + 1/2) / 2
    # "go on go on" and "on go on go" of 37 runs of four of the 40 words, and 2 of 2.
    assert base.distinct.value == pytest.approx((1 + (1 + 2 / 37) / 2) / 2)
    assert it.distinct.value == pytest.approx((2 / 37 + (1 + 2 / 37) / 2) / 2)
    assert base.changes == {name: {} for name in ("tokens", "cut", "looping", "distinct", "pass@2")}
    changes = {name: change["base"] for name, change in it.changes.items()}
    assert changes["looping"].value == changes["cut"].value == 0.5
    assert (changes["looping"].low, changes["looping"].high) == (0, 1)  # p1 changes by 1, p2 not at all
    assert changes["tokens"].value == 10
    assert changes["distinct"].value == pytest.approx((2 / 37 - 1) / 2)


def test_lengths_that_a_server_did_not_tell_have_no_change():
    samples = [
        sample(f"p{n}", arm, 0, "1", True, tokens=told) for n in range(3) for arm, told in (("a", 5), ("b", None))
    ]
    first, second = scores(samples, ["a", "b"], {})
    assert first.tokens is not None
    assert "tokens" not in second.changes
    assert second.changes["cut"]["a"].value == 0


def test_nothing_solved_has_wilsons_interval_and_no_length_where_none_was_told():
    samples = [sample(f"p{n}", "base", 0, "1", False, tokens=None) for n in range(30)]
    (score,) = scores(samples, ["base"], {})
    assert score.accuracy.low == 0
    assert score.accuracy.high == pytest.approx(0.1135, abs=1e-3)  # z^2 / (30 + z^2)
    assert (score.tokens, score.sampled_tokens, score.majority, score.pass_at) == (None, None, None, {})


def test_failures_are_shares_of_the_samples():
    outcomes = ["correct", "unparseable", "timed out", "bad gold"]
    samples = [sample(f"p{n}", "base", 0, None, False, outcome=outcome) for n, outcome in enumerate(outcomes)]
    (score,) = scores(samples, ["base"], {})
    assert score.failures == {"unparseable": 0.25, "timed out": 0.25, "bad gold": 0.25}
