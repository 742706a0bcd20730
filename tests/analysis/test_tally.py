"""Counts over tokens: parts add up to the whole, and each number is the plain one."""

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bias.analysis.readings import TokenReadings
from moe_bias.analysis.record import estimate_record, place_names
from moe_bias.analysis.summary import by_stratum, information, mean_over_groups, share_by_row
from moe_bias.analysis.tally import (
    ENTROPY_EDGES,
    GROUPS,
    PLACES,
    QUANTITIES,
    Tally,
    TokenFacts,
    entropy_bins,
    place_bins,
    quantities,
)
from moe_bias.analysis.token_classes import CLASSES

EXPERTS = 5
quick = settings(max_examples=50, deadline=None)


def drawn(tokens: int, seed: int) -> tuple[TokenReadings, TokenFacts]:
    """Random readings of tokens in order of their examples, which are more than there are groups."""
    torch.manual_seed(seed)
    positive = {
        name: 3 * torch.rand(tokens)
        for name in ("base_entropy", "adapted_entropy", "kl", "weight", "bias_mean", "bias_max")
    }
    gates_TK, experts_TK = torch.rand(tokens, EXPERTS).topk(2)
    readings = TokenReadings(
        **positive,
        experts=experts_TK,
        gates=gates_TK,
        base_choice=torch.randint(3, (tokens,)),
        adapted_choice=torch.randint(3, (tokens,)),
        base_log_prob=-torch.rand(tokens),
        adapted_log_prob=-torch.rand(tokens),
    )
    facts = TokenFacts(
        torch.randint(2 * GROUPS, (tokens,)).sort().values,
        torch.randint(5000, (tokens,)),
        torch.randint(3, (tokens,)),
        torch.randint(len(CLASSES), (tokens,)),
        readings.base_entropy > 2,
    )
    return readings, facts


def part(values, rows):
    """Some of the tokens."""
    return type(values)(**{field.name: getattr(values, field.name)[rows] for field in fields(values)})


@quick
@given(st.integers(0, 60), st.lists(st.integers(0, 60), max_size=5), st.integers(0, 99))
def test_parts_add_up_to_the_whole(tokens, cuts, seed):
    readings, facts = drawn(tokens, seed)
    edges = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    rows = [slice(start, stop) for start, stop in pairwise(edges)]
    parts = [Tally.of(part(readings, row), part(facts, row), EXPERTS) for row in rows]
    whole = Tally.of(readings, facts, EXPERTS)
    for order in (parts, parts[::-1]):
        merged = sum(order, Tally.empty(EXPERTS))
        for field in fields(Tally):
            ours, expected = getattr(merged, field.name), getattr(whole, field.name)
            if ours.is_floating_point():
                torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
            else:
                assert torch.equal(ours, expected), field.name


def test_each_number_is_the_plain_one():
    readings, facts = drawn(400, 3)
    tally = Tally.of(readings, facts, EXPERTS)
    found = by_stratum(tally)
    for name, mask_T in (
        ("all", torch.ones(400, dtype=torch.bool)),
        ("high", facts.is_high),
        ("low", ~facts.is_high),
    ):
        stratum = found[name]
        assert stratum.tokens == int(mask_T.sum())
        flipped_T = readings.base_choice != readings.adapted_choice
        expected = {
            "kl": readings.kl,
            "flipped": flipped_T,
            "mended": flipped_T & (readings.adapted_choice == facts.token),
            "spoiled": flipped_T & (readings.base_choice == facts.token),
            "log_prob_change": readings.adapted_log_prob - readings.base_log_prob,
        }
        for quantity, values_T in expected.items():
            estimate = stratum.means[quantity]
            assert estimate.value == pytest.approx(float(values_T[mask_T].double().mean()))
            assert estimate.low < estimate.value < estimate.high
        right = stratum.means["adapted_right"].value - stratum.means["base_right"].value
        assert right == pytest.approx(stratum.means["mended"].value - stratum.means["spoiled"].value)
        assert stratum.bias_max == float(readings.bias_max[mask_T].max())
        slots_E = readings.experts[mask_T].flatten().bincount(minlength=EXPERTS).double()
        assert stratum.expert_share == pytest.approx((slots_E / slots_E.sum()).tolist())
    assert set(QUANTITIES) == set(found["all"].means)
    assert tally.histogram.sum(1).tolist() == [400, 400]
    assert int(tally.by_class.sum()) == int(tally.by_place.sum()) == 800


def test_a_stratum_without_tokens_is_left_out_and_one_example_gives_no_interval():
    readings, facts = drawn(20, 0)
    facts = TokenFacts(torch.zeros_like(facts.example), facts.position, facts.token, facts.kind, facts.token >= 0)
    found = by_stratum(Tally.of(readings, facts, EXPERTS))
    assert set(found) == {"all", "high"}
    kl = estimate_record(found["high"].means["kl"])
    assert kl == {"value": pytest.approx(float(readings.kl.double().mean())), "low": None, "high": None}


def test_intervals_resample_examples_and_not_tokens():
    """Two hundred tokens of ten examples that are each all 0 or all 1 tell as much as ten tokens."""
    sums_G, tokens_G = torch.zeros(GROUPS), torch.zeros(GROUPS)
    sums_G[:5], tokens_G[:10] = 20, 20
    wide = mean_over_groups(sums_G, tokens_G)
    assert wide.value == 0.5
    assert wide.high - wide.low > 0.5


def test_bins():
    entropies = torch.tensor([0.0, 1e-9, 1e-4, 1.0, 15.9, 99.0, -0.0])
    bins = entropy_bins(entropies)
    last = len(ENTROPY_EDGES) - 2
    assert bins[[0, 1, 6]].tolist() == [0, 0, 0]
    assert bins[[4, 5]].tolist() == [last, last]
    for entropy, number in zip(entropies[2:4].double().tolist(), bins[2:4].tolist(), strict=True):
        assert ENTROPY_EDGES[number] <= entropy < ENTROPY_EDGES[number + 1]
    assert place_bins(torch.tensor([0, 1, 2, 3, 4, 7, 8, 2**20])).tolist() == [0, 1, 2, 2, 3, 3, 4, PLACES - 1]
    names = place_names()
    assert len(names) == PLACES
    assert names[:4] == ["0", "1", "2-3", "4-7"]
    assert names[-2:] == ["8192-16383", "16384-"]
    assert place_bins(torch.tensor([8192, 16383, 16384])).tolist() == [PLACES - 2, PLACES - 2, PLACES - 1]


def test_mutual_information():
    none = information(torch.tensor([[10, 30], [20, 60]]))
    assert none.nats == pytest.approx(0, abs=1e-12)
    whole = information(torch.tensor([[7, 0], [0, 7]]))
    assert whole.nats == pytest.approx(math.log(2))
    assert whole.at_most == pytest.approx(math.log(2))
    # (3 of 8) log(3/8 / (1/2 1/2)) twice, (1 of 8) log(1/8 / (1/2 1/2)) twice
    some = information(torch.tensor([[3, 1], [1, 3]]))
    assert some.nats == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert information(torch.zeros(2, 3, dtype=torch.int64)).nats == 0


def test_shares_by_row():
    counts = torch.tensor([[1, 3], [0, 0], [2, 0]])
    assert share_by_row(counts, ["a", "b", "c"]) == {"a": [0.25, 0.75], "c": [1.0, 0.0]}


def test_quantities_are_in_their_order():
    readings, facts = drawn(7, 1)
    table_TQ = quantities(readings, facts.token)
    assert table_TQ.shape == (7, len(QUANTITIES))
    assert torch.equal(table_TQ[:, QUANTITIES.index("kl")], readings.kl.double())
    assert torch.equal(table_TQ[:, QUANTITIES.index("flipped")], readings.flipped.double())
