from dataclasses import replace

import pytest
import torch

from helpers.lessons import HEAD, contents, edit, entry, fresh_layer, learner, rewarded, taught
from moe_bias.config import LayerConfig, LearnConfig
from moe_bias.features.adapted import adapted_policy
from moe_bias.learning.journal import STATE, Entry
from moe_bias.learning.learner import FREEZE, UNDO, UNFREEZE, Learner, written
from moe_bias.learning.lessons import Batch
from moe_bias.learning.update import Measured, loss_on
from moe_bias.mistakes import UserError


def loss_of(pupil, lesson):
    config = LearnConfig()
    return loss_on(pupil.layer, Measured.of(Batch.of([lesson], config.rho), HEAD), HEAD.transform, config)


def unchanged(before, after):
    """Whether tensors that were there are as they were; lessons may have come."""
    return {name: after[name] for name in before} == before


def probability_of(pupil, lesson):
    """Mean probability of the lesson's own tokens."""
    measured = Measured.of(Batch.of([lesson], 1.0), HEAD)
    with torch.no_grad():
        adapted = adapted_policy(pupil.layer, lesson.features, measured.logits, HEAD.transform)
    return float(adapted.log_prob.exp().mean())


def test_edits_are_learned_and_hold_for_other_texts():
    pupil, unseen = learner(), edit(77)
    before = loss_of(pupil, unseen)
    outcomes = taught(pupil, [edit(seed) for seed in range(12)])
    assert sum(outcome.published for outcome in outcomes) > 5
    assert loss_of(pupil, unseen) < before - 1
    assert pupil.version == outcomes[-1].version == sum(outcome.published for outcome in outcomes)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rewards_move_answers_towards_and_away(sign):
    pupil, unseen = learner(held_out_every=100), [rewarded(0.0, 50, token=9), rewarded(0.0, 50, token=30)]
    before = [probability_of(pupil, lesson) for lesson in unseen]
    for number in range(1, 13):
        token, value = (9, sign) if number % 2 else (30, -sign)
        pupil.apply(entry(number, rewarded(value, number, token=token)))
    first, second = (probability_of(pupil, lesson) / then for lesson, then in zip(unseen, before, strict=True))
    assert first > 1.1 * second if sign > 0 else second > 1.1 * first


def test_every_so_many_lessons_one_is_kept_to_measure_by():
    outcomes = taught(learner(held_out_every=3), [edit(seed) for seed in range(6)])
    assert [outcome.applied for outcome in outcomes] == [True, True, False, True, True, False]
    assert outcomes[2].reason == "kept to measure by"
    assert outcomes[1].loss_before is None
    assert outcomes[3].loss_before is not None


def test_what_makes_the_measured_lessons_worse_is_not_published():
    pupil = learner(held_out_every=9, tolerance=0.0, replay=0)
    taught(pupil, [edit(seed) for seed in range(9)])
    for number in range(10, 18):  # moments carry the first contrary ones on the old way
        before, version = contents(pupil)[1], pupil.version
        outcome = pupil.apply(entry(number, edit(number, wanted=40)))
        if not outcome.published:
            break
    assert outcome.applied
    assert not outcome.published
    assert "worse on the lessons" in outcome.reason
    assert outcome.loss_after > outcome.loss_before
    assert (outcome.version, pupil.version) == (version, version)
    assert unchanged(before, contents(pupil)[1])


def test_an_update_keeps_its_bounds_or_is_not_published():
    tight = learner(step_kl=1e-3)
    outcome = tight.apply(entry(1, edit()))
    assert not outcome.published or outcome.step_kl <= 1e-3
    narrow = learner(step_kl=1e-12, base_kl=1e-12)
    before = contents(narrow)[1]
    outcome = narrow.apply(entry(1, edit()))
    assert not outcome.published
    assert "beyond its bounds" in outcome.reason
    assert unchanged(before, contents(narrow)[1])
    bounded = learner(step_kl=0.05)
    for outcome in taught(bounded, [edit(seed) for seed in range(4)]):
        assert not outcome.published or outcome.step_kl <= 0.05


def test_undo_goes_back_version_by_version_and_forgets_the_lessons_since():
    pupil = learner(held_out_every=100)
    states = [contents(pupil)[1]]
    for number in (1, 2, 3):
        pupil.apply(entry(number, edit(number)))
        states.append(contents(pupil)[1])
    for number, then in ((4, 2), (5, 1), (6, 0)):
        outcome = pupil.apply(entry(number, event=UNDO))
        assert outcome.published
        assert outcome.version == number
        now = {name: value for name, value in contents(pupil)[1].items() if name.startswith("line.")}
        last = max(now, key=lambda name: int(name.split(".")[1])).split(".")[1]
        for name, value in now.items():
            if name.startswith(f"line.{last}."):
                assert states[then][name] == value
        assert len(contents(pupil)[0]["replayed"]) == then
    outcome = pupil.apply(entry(7, event=UNDO))
    assert not outcome.published
    assert "no version to go back to" in outcome.reason


def test_a_frozen_adapter_keeps_lessons_and_learns_none():
    pupil = learner()
    assert pupil.apply(entry(1, event=FREEZE)).version == 0
    outcome = pupil.apply(entry(2, edit()))
    assert (outcome.applied, outcome.published, outcome.reason) == (False, False, "the adapter is frozen")
    pupil.apply(entry(3, event=UNFREEZE))
    assert pupil.apply(entry(4, edit(1))).published


def everything(count=30):
    """Entries of all kinds."""
    told = []
    for number in range(1, count + 1):
        if number % 9 == 0:
            told.append(entry(number, event=UNDO))
        elif number in (13, 16):
            told.append(entry(number, event=FREEZE if number == 13 else UNFREEZE))
        else:
            told.append(entry(number, rewarded(0.5 - number % 2, number) if number % 4 == 0 else edit(number)))
    return told


def test_the_same_entries_give_the_same_bytes():
    first, second = learner(), learner()
    for told in everything():
        first.apply(told)
        second.apply(told)
    assert contents(first) == contents(second)


@pytest.mark.parametrize("stop", [1, 5, 14, 29])
def test_a_state_goes_on_to_the_same_bytes(stop):
    whole, told = learner(), everything()
    for one in told[:stop]:
        whole.apply(one)
    header, tensors = whole.state()
    saved = Entry(stop, STATE, header, {name: tensor.clone() for name, tensor in tensors.items()}, 0)
    resumed = learner()
    assert resumed.apply(saved) is None
    for one in told[stop:]:
        assert whole.apply(one) == resumed.apply(one)
    assert contents(whole) == contents(resumed)


def changed(first=11, second=21):
    """The same entries, two of which say another config than those before."""
    configs = {
        1: LearnConfig(expert_rate=0.1),
        first: LearnConfig(expert_rate=0.05, passes=3, rho=0.7, kept_lessons=4, held_out_lessons=2, beta=0.3),
        second: LearnConfig(expert_rate=0.05, optimizer="sgd", replay=2, undo_depth=2, warmup=0.5, seed=5),
    }
    return [
        replace(told, header={**told.header, "config": written(configs[told.number])})
        if told.number in configs
        else told
        for told in everything()
    ]


def test_the_config_is_the_journals_own():
    first, second = Learner(fresh_layer(), HEAD, LearnConfig(passes=9, expert_rate=0.01)), learner()
    other = learner()
    for plain, told in zip(everything(), changed(), strict=True):
        assert first.apply(told) == second.apply(told)
        other.apply(plain)
        assert (contents(second) == contents(other)) == (told.number < 11)
    assert contents(first) == contents(second)
    assert len(contents(first)[0]["replayed"]) > 4  # the last config keeps more again


@pytest.mark.parametrize("stop", [10, 11, 15, 20, 21, 25])
def test_a_state_knows_its_config(stop):
    whole, told = learner(), changed()
    for one in told[:stop]:
        whole.apply(one)
    header, tensors = whole.state()
    resumed = Learner(fresh_layer(), HEAD, LearnConfig(passes=9))
    resumed.apply(Entry(stop, STATE, header, {name: tensor.clone() for name, tensor in tensors.items()}, 0))
    for one in told[stop:]:
        assert whole.apply(one) == resumed.apply(one)
    assert contents(whole) == contents(resumed)


def test_lessons_that_count_otherwise_are_measured_anew():
    lessons = [rewarded(0.5, seed, token=9 + seed) for seed in range(6)]
    pupil, other = learner(held_out_every=2), learner(held_out_every=2)
    for number, lesson in enumerate(lessons, 1):
        header = {"config": written(LearnConfig(expert_rate=0.1, held_out_every=2, rho=1.0))} if number == 5 else {}
        pupil.apply(entry(number, lesson, **header))
        outcome = other.apply(entry(number, lesson))
    assert outcome is not None
    assert pupil.history[4].loss_before != other.history[4].loss_before


def test_rates_fall_within_one_lesson_and_not_below_nothing():
    steady, falling = learner(passes=8), learner(passes=8, decay="linear")
    outcomes = [pupil.apply(entry(1, edit())) for pupil in (steady, falling)]
    assert 0 < outcomes[1].step_kl < outcomes[0].step_kl
    assert loss_of(falling, edit()) < loss_of(learner(), edit())


def test_nothing_is_applied_twice():
    pupil = learner()
    taught(pupil, [edit(0), edit(1)])
    before = contents(pupil)
    assert pupil.apply(entry(1, edit(0))) is None
    assert pupil.apply(entry(2, edit(1))) is None
    assert contents(pupil) == before
    with pytest.raises(AssertionError, match="lacks an entry"):
        pupil.apply(entry(5, edit(0)))


def test_an_event_of_a_later_version_is_told_of():
    with pytest.raises(UserError, match="'sing'"):
        learner().apply(entry(1, event="sing"))


def test_lessons_and_versions_are_bounded():
    pupil = learner(kept_lessons=3, held_out_lessons=2, held_out_every=2, undo_depth=2)
    for number in range(1, 21):
        pupil.apply(entry(number, edit(number)))
    header, _ = pupil.state()
    assert len(header["replayed"]) == 3
    assert len(header["held_out"]) == 2
    assert len(header["line"]) <= 3
    assert pupil.nbytes < 2e6


def test_a_layer_of_another_kind_learns_too():
    for kind in ("free", "directions"):
        choices = {"experts": kind, "support": tuple(range(3, 70)), "num_experts": 2, "top_k": 1}
        torch.manual_seed(0)
        pupil = Learner(HEAD.layer(LayerConfig(**choices)), HEAD, LearnConfig())
        before = loss_of(pupil, edit(77))
        taught(pupil, [edit(seed) for seed in range(8)])
        assert loss_of(pupil, edit(77)) < before
