"""Headroom on features in which it is known what there is to gain."""

import math

import pytest
import torch

from helpers.models import HIDDEN
from helpers.training import head_of
from moe_bias.config import SFTConfig
from moe_bias.experiments import headroom
from moe_bias.experiments.headroom import CHOICE, LAYER, NETWORK, STATIC, Options, measure, prepared_ground
from moe_bias.features.extract import HiddenTokens, with_scalars
from moe_bias.mistakes import UserError

SUPPORT = list(range(2, 60))
OPTIONS = Options()
CONFIG = SFTConfig(batch_tokens=32, expert_rate=1e-1, router_rate=3e-2)


def features(head, targets, tokens, seed):
    """Hidden states (T, D) with the targets that a function gives them; seven tokens are an example."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, HIDDEN, generator=generator)
    token_T = targets(hidden_TD, head, generator)
    return with_scalars(head, HiddenTokens(hidden_TD, token_T, torch.arange(tokens) // 7), SUPPORT, "test")


def planted(hidden_TD, head, generator):
    """A token that no linear function of the hidden state tells, and neither does the base."""
    return torch.where(hidden_TD[:, 0] * hidden_TD[:, 1] > 0, 7, 30)


def shuffled(hidden_TD, head, generator):
    token_T = planted(hidden_TD, head, generator)
    return token_T[torch.randperm(len(token_T), generator=generator)]


def of_the_base(hidden_TD, head, generator):
    return torch.multinomial(head.logits(hidden_TD).softmax(-1), 1, generator=generator)[:, 0]


def found_on(targets, config=CONFIG, options=OPTIONS, tokens=1400):
    head = head_of()
    train, held_out = features(head, targets, tokens, 0), features(head, targets, 700, 1)
    return measure(prepared_ground(train, held_out, head, config, lambda sums: sums), options, len(train))


@pytest.fixture(scope="module")
def on_planted():
    return found_on(planted)


def test_what_is_planted_is_found_by_what_is_not_linear(on_planted):
    """Each of two tokens comes as often: without the hidden state nothing is below log 2."""
    change = {probe.name: probe.change["all"] for probe in on_planted.probes}
    assert all(change[name].high < 0 for name in (STATIC, LAYER, NETWORK, CHOICE))
    best = on_planted.probe(on_planted.best)
    assert best.nll["all"].value < math.log(2) - 0.1
    assert best.picked.value > on_planted.probe("base").picked.value + 0.2


def test_figures_are_of_what_they_say(on_planted):
    assert on_planted.train_tokens + on_planted.stop_tokens == on_planted.available_tokens == 1400
    assert on_planted.held_out_tokens == 700
    assert on_planted.examples == 100
    assert on_planted.stop_tokens == 140
    assert on_planted.coverage.support == 1.0
    assert 0 < on_planted.coverage.high_share < 1
    sizes = [point.tokens for point in on_planted.curve]
    assert sizes == [157, 157, 315, 315, 630, 630, 1260]
    assert on_planted.curve[-1].nll == pytest.approx(on_planted.probe(LAYER).nll["all"].value)
    assert on_planted.curve[0].nll != on_planted.curve[1].nll


def test_on_shuffled_targets_no_probe_is_below_chance(monkeypatch):
    monkeypatch.setattr(headroom, "SHARES", ())  # the curve would take half the time
    found = found_on(shuffled)
    assert {probe.name: probe.nll["all"].value for probe in found.probes if probe.nll["all"].high < math.log(2)} == {}
    assert found.probe(found.best).picked.value < 0.65


def test_the_bases_own_samples_leave_nothing_to_gain():
    found = found_on(of_the_base)
    assert all(-0.01 < probe.change["all"].value <= 0.01 for probe in found.probes)
    assert found.forecast.nll == {}
    assert "there is nothing to extrapolate" in found.forecast.reason


def test_after_the_time_limit_nothing_is_begun():
    found = found_on(planted, options=Options(time_limit=1e-9))
    assert [probe.name for probe in found.probes] == ["base"]
    assert found.best is None
    assert found.left_out[:3] == [STATIC, LAYER, NETWORK]
    assert found.left_out[-1] == CHOICE
    assert "0 trainings of 0 sizes are too few" in found.forecast.reason


@pytest.mark.parametrize(
    ("tokens", "config", "sentence"),
    [
        (700, CONFIG, "there are 700 tokens to train on; at least 800 are needed"),
        (1400, CONFIG.model_copy(update={"train_tokens": 90}), "`train_tokens` is 90; at least 800 are needed"),
    ],
)
def test_too_little_is_refused(tokens, config, sentence):
    with pytest.raises(UserError, match=sentence):
        found_on(planted, config, tokens=tokens)
