import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bias.mistakes import UserError
from moe_bias.tasks.rewards import RewardRules, Rewards, load_reward, overlong_penalty
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import Verdict, failed, judged

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
        ({"overlong_cache": -1}, "overlong_cache = -1 is negative"),
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
