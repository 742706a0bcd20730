"""What arms by rewards do at most, counted by hand."""

import pytest

from moe_bias.config import CompareConfig
from moe_bias.experiments.policy_budgets import LORA_START, WORKED, Grounds, Work, evaluated_steps, shared_work, work_of
from moe_bias.training.budget import Text

GROUNDS = Grounds(
    train=10,
    test=4,
    sets=2,
    prompt_tokens=6,
    worked=Text(100, 160),
    warm=Text(30, 48),
    held_out=Text(40, 64),
    worked_tokens=20,
)


def config(**changes) -> CompareConfig:
    chosen = {"steps": 5, "evaluate_every": 2, "prompts": 3, "group": 2, "max_new_tokens": 7, "rho": 0.5, "epochs": 4}
    return CompareConfig(**{"warm_problems": 3, "warm_epochs": 11, "lora_warm_epochs": 2, **chosen, **changes})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Answers: 2 sets x 4 problems x 7 tokens, after 0, 2, 4 and 5 steps. Samples: 5 x 3 x 2.
        ("base", Work(measured=56)),
        ("moe-bias", Work(30, 210, 4 * 56, trained=11 * 30 + 4 * 105)),
        ("moe-bias-all-tokens", Work(30, 210, 4 * 56, trained=11 * 30 + 4 * 210)),
        ("static", Work(30, 210, 4 * 56, trained=20 * 30 + 4 * 105)),  # a vector's own 20 passes
        ("first-token", Work(30, 210, 4 * 56, trained=20 * 30 + 4 * 30)),
        # 15 problems are learned from, of 10 tokens on average, 16 with their prompts.
        ("moe-bias-sft", Work(measured=4 * 56, trained=11 * 30 + 4 * 150)),
        ("lora-sft", Work(measured=3 * 56, updated=2 * 240)),
        ("lora", Work(30, 210, 3 * 56, updated=30 * 13)),
        ("lora-high-entropy", Work(30, 210, 3 * 56, updated=30 * 13)),
    ],
)
def test_work_by_hand(name, expected):
    assert evaluated_steps(config()) == [0, 2, 4, 5]
    assert work_of(name, config(), GROUNDS) == expected


def test_samples_are_at_most_of_all_problems():
    assert work_of("moe-bias", config(resamples=1), GROUNDS).samples == 5 * 6 * 2
    assert work_of("moe-bias", config(resamples=9), GROUNDS).samples == 5 * 10 * 2
    assert work_of("moe-bias", config(warm_problems=0), GROUNDS).sampled == 210 + 10 * 4 * 7  # for the support


def test_what_arms_share_is_counted_once():
    runs = {"base": 1, "moe-bias": 3, "moe-bias-sft": 0, "lora": 2, "lora-sft": 1}
    found = shared_work(runs, 2, config(), GROUNDS)
    assert found == {WORKED: Work(forward=48 + 64), LORA_START: Work(measured=2 * 56, updated=2 * 2 * 48)}
    assert shared_work(runs | {"moe-bias-sft": 1}, 2, config(), GROUNDS)[WORKED].forward == 48 + 64 + 160
    assert shared_work({"base": 1}, 0, config(), GROUNDS) == {}


def test_work_adds_up():
    assert Work(1, 2, 3, 4, 5, 6).times(2) + Work(updated=1) == Work(2, 4, 6, 8, 10, 13)
