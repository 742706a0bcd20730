"""The loop of reinforcement learning on a tiny random model, its rewards made up."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from helpers.models import VOCABULARY, randomise, tiny_model
from helpers.reinforcement import SUPPORT, Setting, settings_of
from helpers.training import features_of
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig
from moe_bias.features.adapted import mean_kl_between
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.training.metrics import MetricsLog, SampleLog
from moe_bias.training.objectives import DAPO
from moe_bias.training.rl import PolicyPosition


def test_reward_rises_and_metrics_say_what_happened():
    setting = Setting(settings_of(steps=9))
    setting.trainer.run()
    rewards = [line["reward"] for line in setting.lines if "reward" in line]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    line = setting.lines[1]
    assert line["samples"] >= 16
    assert 0.5 <= line["selected"] / line["tokens"] < 0.75
    assert line["kl"] > 0
    assert line["updates"] == 2 * -(-line["selected"] // 8)
    assert setting.accuracies == 6  # before the first step, after every second, and after the last


class Forgetful:
    """A sampler that gives no hidden states below the entropy that it is told."""

    def __init__(self, sampler):
        self.sampler, self.asked = sampler, []

    def sample(self, prompts, layer, choices, seed, description="samples"):
        rollouts = self.sampler.sample(prompts, layer, choices, seed, description)
        self.asked.append(choices.keep_above)
        if choices.keep_above is None:
            return rollouts
        kept_T = rollouts.policy_entropy >= choices.keep_above
        rollouts.features.hidden[~kept_T] = torch.nan
        return replace(rollouts, kept=kept_T)


def test_hidden_states_below_the_last_threshold_are_not_needed():
    """With a margin the run is the same where thresholds fall by less, and never touches what was left out."""
    whole = Setting(settings_of(steps=4))
    forgetful = Forgetful(whole.collector.sampler)
    part = Setting(settings_of(steps=4), changed=lambda one: replace(one, sampler=forgetful, margin=1.0))
    whole.trainer.run()
    part.trainer.run()
    thresholds = [line["threshold"] for line in part.lines if "threshold" in line]
    told = [above for above in forgetful.asked if above is not None]
    assert told[0] == max(thresholds[0] - 1.0, 0.0)
    for name, tensor in whole.layer.state_dict().items():
        assert torch.equal(part.layer.state_dict()[name], tensor)


def test_tokens_whose_hidden_states_were_left_out_are_not_selected():
    setting = Setting(settings_of(steps=1))
    collector = setting.collector
    whole = collector.collect(setting.layer, 0)
    above = whole.threshold + 0.005
    part = replace(collector, sampler=Forgetful(collector.sampler), margin=0.0).collect(setting.layer, 0, above)
    assert 0 < len(part.batch) < len(whole.batch)
    assert not part.batch.hidden.isnan().any()
    assert part.threshold == whole.threshold
    none = replace(collector, sampler=Forgetful(collector.sampler), margin=0.0).collect(setting.layer, 0, 1e3)
    assert none.batch is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trainer_finds_the_sampler_s_log_probabilities(temperature):
    setting = Setting(settings_of(temperature=temperature, steps=3))
    setting.trainer.run()
    assert max(line["sampler_gap"] for line in setting.lines if "sampler_gap" in line) < 1e-5


def test_frozen_model_and_first_step_are_untouched_by_what_is_not_selected():
    setting = Setting(settings_of(steps=1, rho=1.0))
    setting.trainer.run()
    assert setting.lines[-1]["selected"] == setting.lines[-1]["tokens"]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path):
    whole = Setting(settings_of())
    whole.trainer.run()
    first = Setting(settings_of(), folder=tmp_path, objective=Deadly(2, whole.lines))
    with pytest.raises(RuntimeError, match="killed"):
        first.trainer.run()
    second = Setting(settings_of(), folder=tmp_path)
    saved = second.checkpoints.load(PolicyPosition)
    assert saved[1].step == 2
    second.trainer.resume(*saved)
    second.trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.layer.parameters(), second.layer.parameters(), strict=True))
    ours = [line for line in whole.lines if line["step"] > 2]
    timeless = [{k: v for k, v in line.items() if "seconds" not in k} for line in ours]
    assert timeless == [{k: v for k, v in line.items() if "seconds" not in k} for line in second.lines]


class Deadly(DAPO):
    """Breaks off in the first update after some steps, as a kill would; `lines` are those of a whole run."""

    def __init__(self, steps, lines):
        super().__init__()
        before = sum(int(line.get("updates", 0)) for line in lines[: steps + 1])
        object.__setattr__(self, "left", [before + 1])  # and the trial before the run

    def __call__(self, now, then):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RuntimeError("killed")
        return super().__call__(now, then)


def test_base_logits_that_do_not_fit_are_made_again_and_change_nothing():
    kept, made = (Setting(settings_of(kl_bound=1.0, logits_budget=budget)) for budget in (2**20, 0))
    for setting in (kept, made):
        setting.trainer.run()
    for one, other in zip(kept.layer.parameters(), made.layer.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_update_exceeds_the_bound_on_kl():
    free, bound = Setting(settings_of(steps=6)), Setting(settings_of(steps=6, kl_bound=0.02))
    free.trainer.run()
    bound.trainer.run()
    assert max(line.get("kl", 0) for line in free.lines) > 0.05
    # Of another step's tokens the same layer has another KL; then no update raises it.
    assert max(line.get("kl", 0) for line in bound.lines) < 0.04
    assert any(parameter.abs().sum() > 0 for parameter in [bound.layer.experts])


@pytest.mark.parametrize("experts", ["free", "linear"])
def test_no_update_moves_further_from_the_policy_that_sampled_than_the_bound(experts):
    choices = {"steps": 4, "experts": experts, "optimizer": "adamw", "expert_rate": 0.3, "router_rate": 0.1}
    free, bound = (Setting(settings_of(**choices, step_kl=most)) for most in (None, 0.01))
    free.trainer.run()
    bound.trainer.run()
    assert max(line.get("step_kl", 0) for line in free.lines) > 0.02
    moved = [line["step_kl"] for line in bound.lines if "step_kl" in line]
    assert max(moved) <= 0.01
    assert max(moved) > 0.001


def test_kl_between_two_states_is_that_of_the_full_softmax():
    head = find_head(tiny_model())[1]
    torch.manual_seed(0)
    before = head.layer(LayerConfig(experts="linear", expert_rank=2, num_experts=4, support=tuple(range(2, 60))))
    randomise(before)
    now = copy.deepcopy(before)
    randomise(now, seed=5, scale=0.3)
    features = features_of(head)
    logits_of = head.columns(features.support)
    found = mean_kl_between(now, before, features, lambda rows: logits_of(features.hidden[rows]), head.transform)
    logits_TV = head.logits(features.hidden).double()
    policies = []
    for layer in (now, before):
        move_TV = layer.on_vocabulary(layer(features.hidden, features.entropy).bias).double()
        policies.append((logits_TV + move_TV).log_softmax(-1))
    expected = (policies[0].exp() * (policies[0] - policies[1])).sum(-1).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_a_step_is_as_small_as_the_share_of_groups_that_teach():
    """One problem of four teaches: with SGD and one update, its step is a quarter of the unshrunk one."""
    moved = {}
    for shrink in (True, False):
        setting = Setting(
            settings_of(steps=1, epochs=1, batch_tokens=4096, resamples=0, max_grad_norm=1e9, shrink_steps=shrink),
            changed=only_first_teaches,
        )
        before = setting.layer.experts.detach().clone()
        setting.trainer.run()
        moved[shrink] = setting.layer.experts.detach() - before
        assert setting.lines[1]["rate_share"] == (0.25 if shrink else 1.0)
    torch.testing.assert_close(moved[True], moved[False] / 4)


def only_first_teaches(collector):
    """Samples of all problems but each step's first are rewarded alike."""

    def judged_alike(problems, rollouts):
        found = collector.judge(problems, rollouts)
        return [replace(one, reward=one.reward if one.problem is problems[0] else 0.0) for one in found]

    return replace(collector, judge=judged_alike)


def test_equal_rewards_stop_the_run_with_the_success_rate():
    setting = Setting(settings_of(steps=9, equal_steps=3), reward=lambda tokens: 0.0)
    with pytest.raises(UserError, match=r"in 3 steps in a row .* 0% of the last samples are right"):
        setting.trainer.run()
    assert torch.equal(setting.layer.experts, torch.zeros_like(setting.layer.experts))


def test_groups_of_equal_rewards_are_replaced_by_other_problems():
    setting = Setting(settings_of(steps=1, resamples=1), reward=lambda tokens: 1.0)
    setting.trainer.run()
    first, second = setting.rounds
    assert len(first) == len(second) == 16  # 4 problems, 4 samples each
    assert not set(first) & set(second)


def test_a_step_s_problems_follow_from_seed_and_step():
    one, other, third = Setting(settings_of()), Setting(settings_of()), Setting(settings_of(seed=1))
    for setting in (one, other, third):
        setting.trainer.run()
    assert one.rounds == other.rounds != third.rounds


def test_first_token_arm_learns_from_first_tokens_alone():
    setting = Setting(
        settings_of(steps=2, rho=1.0),
        changed=lambda one: replace(one, choices=replace(one.choices, first_token_only=True)),
    )
    setting.trainer.run()
    assert all(line["selected"] <= 16 for line in setting.lines if "selected" in line)


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"top_p": 0.9}, {"rho": 0}, {"group": 1}, {"epochs": 0}])
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        settings_of(**changes)


def test_logs_go_on_where_the_checkpoint_is(tmp_path):
    for log in (MetricsLog(tmp_path, 0), SampleLog(tmp_path, 1, 0)):
        for step in (1, 2, 3):
            log.write(step, {"a": 1.0} if isinstance(log, MetricsLog) else [{"question": "\u2028"}])
        log.close()
    for log in (MetricsLog(tmp_path, 2), SampleLog(tmp_path, 1, 2)):
        log.close()
    for name in ("metrics", "samples"):
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert re.findall(r'"step": (\d)', text) == ["1", "2"]


def test_a_static_layer_is_trained_too():
    config = LayerConfig(experts="free", num_experts=1, top_k=1, entropy_gate=False, support=SUPPORT)
    layer = MoEBiasLayer(config, 16, VOCABULARY)
    Setting(settings_of(), layer=layer).trainer.run()
    assert layer.experts.abs().sum() > 0
