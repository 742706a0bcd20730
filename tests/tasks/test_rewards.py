import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bias.mistakes import UserError
from moe_bias.tasks.rewards import RewardRules, Rewards, load_reward, overlong_penalty
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import Verdict, failed, judged
from moe_bias.training.advantage import LengthAdvantages, group_advantages

PROBLEM = Problem("1 + 1?", "2", "The answer is 2.", {})
RIGHT, WRONG = judged(True, "2"), judged(False, "3")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of rewards into the current folder and gives its name."""

    def write(body: str) -> str:
        (tmp_path / "own_rewards.py").write_text(body)
        return "own_rewards"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield write
    sys.modules.pop("own_rewards", None)


def shaped(rewards: Rewards, verdict: Verdict, completion: str = "", length: int = 0) -> float:
    (reward,) = rewards.shaped([PROBLEM], [completion], [verdict], [length], limit=100)
    return reward


def test_by_default_a_reward_is_the_verdicts():
    rewards = Rewards(RewardRules())
    assert [shaped(rewards, v, length=100) for v in (RIGHT, WRONG, failed("timed out"))] == [1.0, 0.0, 0.0]


def test_the_weighted_mean_of_verdict_and_form_by_hand():
    rewards = Rewards(RewardRules(form=r"^<think>.*</think>", form_weight=0.25))
    # (1 * 1 + 0.25 * 1) / 1.25 = 1; without the form 1 / 1.25 = 0.8; the form alone 0.25 / 1.25 = 0.2.
    assert shaped(rewards, RIGHT, "<think>so\nso</think> 2") == pytest.approx(1.0)
    assert shaped(rewards, RIGHT, "2") == pytest.approx(0.8)
    assert shaped(rewards, WRONG, "<think></think> 3") == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("length", "penalty"),
    # A limit of 100 with a cache of 20: nothing up to 80, then a twentieth for each token.
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (120, -1.0)],
)
def test_overlong_shaping_by_hand(length, penalty):
    assert overlong_penalty(length, limit=100, cache=20) == pytest.approx(penalty)
    rewards = Rewards(RewardRules(overlong_cache=20))
    assert shaped(rewards, RIGHT, length=length) == pytest.approx(1 + penalty)
    assert shaped(rewards, WRONG, length=length) == pytest.approx(penalty)


@given(st.integers(0, 300), st.integers(1, 200), st.integers(0, 200))
def test_a_longer_answer_is_never_worth_more(length, limit, cache):
    now, longer = overlong_penalty(length, limit, cache), overlong_penalty(length + 1, limit, cache)
    assert -1 <= longer <= now <= 0


@pytest.mark.parametrize(
    ("rules", "length", "worth"),
    [
        ({"length_penalty": 0.2}, 0, 1.0),
        ({"length_penalty": 0.2}, 50, 0.9),  # 1 - 0.2 * 50 / 100
        ({"length_penalty": 0.2}, 51, 0.898),
        ({"length_penalty": 2.0}, 50, 0.0),
        ({"length_penalty": 2.0}, 100, 0.0),  # not -1: no length makes right worse than wrong
        ({"token_budget": 50}, 50, 1.0),
        ({"token_budget": 50}, 51, 0.0),
        ({"token_budget": 50, "length_penalty": 1.0}, 50, 0.5),
    ],
)
def test_length_shapes_right_answers_alone_by_hand(rules, length, worth):
    rewards = Rewards(RewardRules(**rules))
    assert shaped(rewards, RIGHT, length=length) == pytest.approx(worth)
    assert shaped(rewards, WRONG, length=length) == shaped(rewards, failed("unparseable"), length=length) == 0


def test_length_beside_other_parts_by_hand(own):
    rewards = Rewards(RewardRules(form="so", form_weight=0.25, length_penalty=0.4))
    # 50 tokens leave 0.8 of a right answer: (1 * 0.8 + 0.25) / 1.25 = 0.84; the form alone is 0.2 at any length.
    assert shaped(rewards, RIGHT, "so", 50) == pytest.approx(0.84)
    assert shaped(rewards, WRONG, "so", 50) == shaped(rewards, WRONG, "so", 100) == pytest.approx(0.2)
    assert rewards.rules.earned_share == pytest.approx(0.8)
    name = own("def half(prompt, completion, gold):\n    return 0.5\n")
    alone = Rewards(RewardRules(verdict_weight=0, user=f"{name}:half", user_weight=2, length_penalty=0.4))
    assert shaped(alone, WRONG, length=50) == pytest.approx(0.4)  # the user's reward says what is right: 0.5 * 0.8
    beside = Rewards(RewardRules(user=f"{name}:half", user_weight=1, length_penalty=0.4))
    assert shaped(beside, WRONG, length=50) == shaped(beside, WRONG, length=90) == pytest.approx(0.25)
    assert shaped(beside, RIGHT, length=50) == pytest.approx((0.8 + 0.5) / 2)
    assert (alone.rules.earned_share, beside.rules.earned_share) == (1.0, 0.5)
    overlong = Rewards(RewardRules(length_penalty=0.4, overlong_cache=20))
    assert shaped(overlong, RIGHT, length=90) == pytest.approx(1 - 0.36 - 0.5)
    assert shaped(overlong, WRONG, length=90) == pytest.approx(-0.5)


@given(
    *(st.integers(0, 300), st.integers(0, 300)),
    *(st.floats(0, 5), st.integers(0, 200), st.sampled_from([0.0, 0.5, 2.0])),
)
def test_among_right_answers_the_shorter_is_worth_no_less_and_no_wrong_one_gains(one, other, penalty, budget, form):
    rules = RewardRules(form="x" * bool(form), form_weight=form, length_penalty=penalty, token_budget=budget)
    rewards, short, long = Rewards(rules), *sorted((one, other))
    right, wrong = ([shaped(rewards, verdict, "", n) for n in (short, long)] for verdict in (RIGHT, WRONG))
    assert wrong[0] == wrong[1] <= right[1] <= right[0] <= 1


@settings(deadline=None)
@given(st.integers(2, 9), st.data(), st.floats(0.01, 1))
def test_what_length_teaches_a_group_that_is_all_right_grows_with_the_penalty(group, data, penalty):
    """Each group divided by its own spread would be taught length as hard by any penalty."""
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=group, max_size=group, unique=True))
    found = {}
    for factor in (penalty / 2, penalty):
        rewards = Rewards(RewardRules(length_penalty=factor))
        shaped_N = torch.tensor(
            rewards.shaped([PROBLEM] * group, [""] * group, [RIGHT] * group, lengths, 100), dtype=torch.float64
        )
        found[factor], kept_N = LengthAdvantages()(shaped_N, group)
        assert kept_N.all()
    spread = penalty * torch.tensor(lengths, dtype=torch.float64).std() / 100
    if spread <= group**-0.5:  # else the group's own spread is the larger one
        torch.testing.assert_close(found[penalty], 2 * found[penalty / 2])
        expected = penalty / 100 * (sum(lengths) / group - torch.tensor(lengths, dtype=torch.float64)) * group**0.5
        torch.testing.assert_close(found[penalty], expected)


@settings(deadline=None)
@given(st.integers(2, 9), st.data())
def test_the_bound_leaves_groups_of_right_and_wrong_as_they_are(group, data):
    right = data.draw(st.lists(st.booleans(), min_size=3 * group, max_size=3 * group))
    reward_N = torch.tensor(right, dtype=torch.float64)
    for bounded, plain in zip(LengthAdvantages()(reward_N, group), group_advantages(reward_N, group), strict=True):
        torch.testing.assert_close(bounded, plain)


def test_a_budget_that_no_answer_could_exceed_is_refused():
    Rewards(RewardRules(token_budget=99)).check_limit(100)
    with pytest.raises(UserError, match="`token_budget` 100 is not below the limit `max_new_tokens` 100, so it would"):
        Rewards(RewardRules(token_budget=100)).check_limit(100)


def test_a_users_reward_takes_part_with_its_weight(own):
    name = own("def half(prompt, completion, gold):\n    return 0.5 * (prompt == '1 + 1?' and gold == '2')\n")
    rewards = Rewards(RewardRules(verdict_weight=1, user=f"{name}:half", user_weight=3))
    rewards.try_on(PROBLEM)
    assert shaped(rewards, RIGHT) == pytest.approx((1 * 1 + 3 * 0.5) / 4)
    assert (rewards.failures.calls, rewards.failures.failures) == (1, 0)


def test_a_users_reward_that_raises_gives_0_and_is_counted(own):
    name = own("def strict(prompt, completion, gold):\n    return float(completion.index('b') > 0)\n")
    rewards = Rewards(RewardRules(user=f"{name}:strict", user_weight=1, overlong_cache=20))
    got = rewards.shaped([PROBLEM] * 4, ["ab", "none", "abc", "x"], [RIGHT] * 4, [1, 100, 1, 1], limit=100)
    assert got == [1.0, 0.0, 1.0, 0.0]
    assert str(rewards.failures) == (
        "own_rewards:strict failed on 2 of 4 samples, first with ValueError: substring not found"
    )


@pytest.mark.parametrize("value", ["1.5", "-0.1", "float('nan')", "float('inf')", "None", "'1'", "[1]"])
def test_a_users_reward_outside_0_to_1_is_refused_and_named(own, value):
    name = own(f"def odd(prompt, completion, gold):\n    return {value}\n")
    rewards = Rewards(RewardRules(user=f"{name}:odd", user_weight=1))
    with pytest.raises(UserError, match=r"own_rewards:odd gave .*, which is not a number from 0 to 1"):
        shaped(rewards, RIGHT)
    with pytest.raises(UserError, match="own_rewards:odd gave"):
        rewards.try_on(PROBLEM)


def test_a_users_reward_that_fails_on_the_first_sample_is_refused_at_the_start(own):
    name = own("def broken(prompt, completion, gold):\n    return {}[gold]\n")
    rewards = Rewards(RewardRules(user=f"{name}:broken", user_weight=1))
    with pytest.raises(UserError, match="own_rewards:broken failed on a first sample with KeyError: '2'"):
        rewards.try_on(PROBLEM)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (
            "own_rewards",
            "there is no reward .own_rewards., looked for .* one of your own is given as module:name",
        ),
        ("own_rewards:", "does not name a reward; write it as module:name"),
        ("no_such_module:f", "'no_such_module:f' cannot be imported: ModuleNotFoundError"),
        ("own_rewards:g", "own_rewards has no g"),
        ("own_rewards:two", "must take a prompt, a completion and a gold answer: too many positional arguments"),
        ("own_rewards:four", "must take a prompt, a completion and a gold answer: missing a required argument"),
    ],
)
def test_rewards_that_cannot_be_called_are_refused(own, reward, said):
    own("def two(prompt, completion): ...\ndef four(prompt, completion, gold, more): ...\n")
    with pytest.raises(UserError, match=said):
        load_reward(reward)


def test_a_module_that_fails_is_named(own):
    own("1 / 0\n")
    with pytest.raises(UserError, match="cannot be imported: ZeroDivisionError: division by zero"):
        load_reward("own_rewards:f")


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"verdict_weight": -1}, "verdict_weight = -1 is not a weight"),
        ({"verdict_weight": math.nan}, "verdict_weight = nan is not a weight"),
        ({"verdict_weight": 0}, "are all 0"),
        ({"overlong_cache": -1}, "overlong_cache = -1 is not a number from 0 up"),
        ({"length_penalty": math.nan}, "length_penalty = nan is not a number from 0 up"),
        ({"token_budget": -3}, "token_budget = -3 is not a number from 0 up"),
        (
            {"length_penalty": 0.5, "verdict_weight": 0, "form": "a", "form_weight": 1},
            "`length_penalty` 0.5 shapes what a right answer is worth, and nothing says what is right",
        ),
        ({"form_weight": 1}, "form = '' and form_weight = 1 do not go together"),
        ({"user": "a:b"}, "user = 'a:b' and user_weight = 0.0 do not go together"),
    ],
)
def test_rules_are_checked(rules, said):
    with pytest.raises(UserError, match=said):
        RewardRules(**rules)


def test_a_form_that_is_no_regular_expression_is_named():
    with pytest.raises(UserError, match=r"form = '\(' is not a regular expression"):
        Rewards(RewardRules(form="(", form_weight=1))
