"""Where two answers part, what came of it, and a policy that acts on one stratum alone: numbers worked by hand."""

import pytest
import torch

from moe_bias.analysis.answers import Answered, accuracy, first_difference, in_stratum, turns
from moe_bias.analysis.flips import kept_flips
from moe_bias.layer import entropy_from_logits


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [7]) == 0


def test_turns_and_accuracy():
    def answered(*outcomes):
        return [Answered([1], outcome) for outcome in outcomes]

    base = answered("wrong", "correct", "correct", "unparseable", "wrong")
    adapted = answered("correct", "wrong", "correct", "wrong", "correct")
    assert turns(base, adapted) == {"mended": 2, "spoiled": 1, "both right": 1, "both wrong": 1}
    found = accuracy({"base": base, "adapted": adapted})
    assert found.share["adapted"].value == 0.6
    assert found.change["adapted"].value == pytest.approx(0.2)
    assert set(found.change) == {"adapted"}


def test_a_policy_on_one_stratum_alone():
    logits_BV = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 5.0, 0]])
    entropy_B = entropy_from_logits(logits_BV)
    threshold = float(entropy_B[1])

    def turned(hidden_BD, logits_BV):
        return -logits_BV

    high = in_stratum(turned, threshold, True)(logits_BV, logits_BV)
    low = in_stratum(turned, threshold, False)(logits_BV, logits_BV)
    assert torch.equal(high, torch.stack([logits_BV[0], -logits_BV[1], logits_BV[2]]))
    assert torch.equal(low, torch.stack([-logits_BV[0], logits_BV[1], -logits_BV[2]]))


def test_flips_that_are_kept_of_answers_turned_a_verdict():
    outcomes = [("wrong", "correct"), ("wrong", "unparseable"), ("correct", "wrong"), ("correct", "correct")]
    changed = [{"base_outcome": base, "adapted_outcome": adapted} for base, adapted in outcomes]
    entry = {"flips": [{"kl": 1.0}], "answers": None}
    assert kept_flips(entry) == [{"kl": 1.0}]
    assert kept_flips({**entry, "answers": {"flips": changed}}) == [changed[0], changed[2]]
