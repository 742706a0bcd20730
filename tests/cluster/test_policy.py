"""Reinforcement learning by workers: the same bytes with any number of them, whoever dies, and what travels.

Workers are in this process here; `test_policy_on_ray` has real ones.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.saved import save_model
from helpers.workers import LettersTask, WorkersHere, share_of_ones
from moe_bias.cluster.model import named_model
from moe_bias.cluster.parts import PolicySpec, PolicyWorker
from moe_bias.cluster.policy import PartsCollector, policy_pool
from moe_bias.config import Cluster, RewardConfig, RLConfig
from moe_bias.frozen import load
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.training.loop import Watching
from moe_bias.training.objectives import DAPO
from moe_bias.training.problems import (
    collector_of,
    fresh_policy_layer,
    rewards_of,
    sampling_choices,
    task_data,
)
from moe_bias.training.rl import PolicyTrainer

USUAL = {
    **{"steps": 3, "prompts": 6, "group": 4, "max_new_tokens": 6, "batch_size": 2, "batch_tokens": 16, "rho": 0.5},
    **{"epochs": 2, "num_experts": 3, "support": "auto:40", "resamples": 2, "expert_rate": 0.02},
}
NOT_OF_THE_RUN = {"seconds", "updating_seconds", "sampling_seconds", "judging_seconds"}
MOVED = {"sampling_bytes", "update_bytes", "update_bytes_each", "workers"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load(save_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def data(base):
    return task_data(base, LettersTask(), LettersTask().problems(18, 0), 14)


class Setting:
    """A run, by workers or by this process (None)."""

    def __init__(self, base, data, workers, objective=None, deadly=frozenset(), changes=None, **own):
        torch.manual_seed(0)  # a fresh layer's router is drawn
        self.settings = RLConfig(**{**USUAL, **own})
        self.rewards = rewards_of(RewardConfig(verdict_weight=0.0, reward_weight=1.0), share_of_ones)
        self.layer: MoEBiasLayer = fresh_policy_layer(data, self.settings).layer
        self.lines: list[dict[str, float]] = []
        self.objective = objective or DAPO(eps_low=self.settings.eps_low, eps_high=self.settings.eps_high)
        self.pool = None
        if workers is None:
            self.collector = collector_of(data, self.rewards, self.settings)
        else:
            spec = PolicySpec(
                named_model(base),
                self.layer.config,
                self.layer.strength,
                self.settings,
                data.task,
                self.rewards.rules,
                self.objective,
                sampling_choices(self.settings, data),
            )
            self.pool = WorkersHere(lambda: Loaded(spec, base), workers, deadly, changes)
            self.collector = PartsCollector(self.pool, data, self.rewards, self.settings, self.objective)
        watching = Watching(log=self)
        self.trainer = PolicyTrainer(self.layer, data.head, self.collector, self.settings, watching, objective)

    def write(self, step, metrics):
        self.lines.append(dict(metrics))

    def ran(self):
        self.trainer.run()
        return self

    def state(self):
        return {name: tensor.clone() for name, tensor in self.layer.state_dict().items()}

    def told(self, apart=NOT_OF_THE_RUN | MOVED):
        return [{name: value for name, value in line.items() if name not in apart} for line in self.lines]

    @property
    def adapter_bytes(self):
        return 4 * sum(tensor.numel() for tensor in self.layer.state_dict().values())


class Loaded(PolicyWorker):
    """Shares the model of this process."""

    def __init__(self, spec, base):
        super().__init__(replace(spec, model=_Here(base)))


class _Here:
    def __init__(self, base):
        self._base = base

    def loaded(self, on_gpu):
        return self._base


def assert_same_bytes(one, other):
    for name, tensor in one.state().items():
        assert torch.equal(other.state()[name], tensor), name
    assert one.told() == other.told()


@pytest.fixture(scope="module")
def by_one(base, data):
    return Setting(base, data, 1).ran()


@pytest.mark.parametrize("workers", [2, 4])
def test_layer_samples_and_metrics_are_the_same_with_any_number_of_workers(base, data, by_one, workers):
    found = Setting(base, data, workers).ran()
    assert_same_bytes(found, by_one)
    assert len({number for number, _ in found.pool.calls}) == min(workers, 3)  # a round has three parts
    assert any(tensor.abs().sum() > 0 for name, tensor in found.state().items() if "directions" in name)


def test_samples_are_those_of_one_process_and_the_layer_but_for_rounding(base, data, by_one):
    alone = Setting(base, data, None).ran()
    first, theirs = alone.told()[0], by_one.told()[0]
    for name in ("reward", "threshold", "selected", "tokens", "entropy", "tokens_per_answer", "samples", "rate_share"):
        assert first[name] == theirs[name], name
    for line, other in zip(alone.told(), by_one.told(), strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
    for name, tensor in alone.state().items():
        torch.testing.assert_close(by_one.state()[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_samples_told_for_a_log_are_those_of_one_process(base, data):
    collected = [Setting(base, data, workers).collector for workers in (None, 2)]
    layers = [Setting(base, data, None).layer] * 2
    ours, theirs = (one.collect(layer, 1).judged for one, layer in zip(collected, layers, strict=True))
    assert [one.as_line() for one in ours] == [one.as_line() for one in theirs]
    quiet = Setting(base, data, 2).collector
    quiet.texts_every = 5
    assert not any(one.text for one in quiet.collect(layers[0], 1).judged)
    assert quiet.collect(layers[0], 4).judged == theirs or all(one.text for one in quiet.collect(layers[0], 4).judged)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_workers_that_die_join_and_leave_change_no_byte(base, data, by_one, data_of):
    drawn = data_of.draw
    deadly = drawn(st.sets(st.integers(4, 140), max_size=9).filter(_no_three_in_a_row))
    changes = drawn(st.dictionaries(st.integers(4, 140), st.integers(1, 4), max_size=3))
    found = Setting(base, data, drawn(st.integers(1, 4)), deadly=deadly, changes=changes).ran()
    assert_same_bytes(found, by_one)


def _no_three_in_a_row(deadly):
    """So many workers that die over one call are an error."""
    return not any({n, n + 1} <= deadly or {n, n + 2} <= deadly for n in deadly)


@pytest.mark.parametrize(
    "own",
    [
        {"step_kl": 1e-7, "expert_rate": 0.5},
        {"kl_bound": 1e-6, "step_kl": None, "expert_rate": 0.5},
        {"step_kl": None, "load_balance_weight": 0.0},
        {"experts": "free", "expert_rate": 3.0, "router_rate": 0.02},
        {"first_token_only": True, "temperature": 0.7, "epochs": 1},
    ],
    ids=["halved and undone", "bound to the base", "no bound", "free experts", "first token"],
)
def test_other_settings_have_the_same_bytes_too_and_follow_one_process(base, data, own):
    one, two = Setting(base, data, 1, **own).ran(), Setting(base, data, 3, deadly={9, 30}, **own).ran()
    assert_same_bytes(one, two)
    alone = Setting(base, data, None, **own).ran()
    for name, tensor in alone.state().items():
        torch.testing.assert_close(one.state()[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


class ByAnswers(DAPO):
    """One loss an answer: the mean over its tokens."""

    unit = "answer"

    def __call__(self, now, then):
        terms = super().__call__(now, then)
        counts = then.features.example.unique(return_inverse=True)[1]
        size = torch.bincount(counts).to(terms.loss)
        return replace(terms, loss=torch.zeros_like(size).index_add(0, counts, terms.loss) / size, metrics={})


def test_an_objective_of_whole_answers(base, data):
    one = Setting(base, data, 1, ByAnswers()).ran()
    assert_same_bytes(one, Setting(base, data, 4, ByAnswers()).ran())
    alone = Setting(base, data, None, ByAnswers()).ran()
    for name, tensor in alone.state().items():
        torch.testing.assert_close(one.state()[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def test_an_update_moves_three_adapters_a_worker_and_a_token_a_few_bytes(base, data):
    """Halved ones no more, whose weights would be eight adapters else. Numbers of each part are counted beside."""
    for own, beside in (({}, 3_000), ({"step_kl": 1e-6, "expert_rate": 0.1}, 10_000)):
        found = Setting(base, data, 2, num_experts=48, max_new_tokens=60, group=8, **own).ran()
        for line in found.lines:
            assert line["update_bytes_each"] < 3 * found.adapter_bytes + beside
            tokens = line["tokens_per_answer"] * line["samples"]
            per_sample_and_call = 400 * line["samples"] + 2 * found.adapter_bytes
            assert line["sampling_bytes"] < 8 * tokens + per_sample_and_call
    small = Setting(base, data, 2, max_new_tokens=100, group=8, batch_tokens=512).ran()
    hidden = small.lines[-1]["tokens"] * 4 * base.head.hidden_size
    assert small.pool.largest < hidden / 8


def test_a_gradient_that_is_not_finite_ends_the_run_as_in_one_process(base, data):
    class Broken(DAPO):
        def __call__(self, now, then):
            terms = super().__call__(now, then)
            return replace(terms, loss=terms.loss * float("inf"))

    sentences = []
    for workers in (None, 2):
        with pytest.raises(UserError, match=r"the loss of step 1 became") as caught:
            Setting(base, data, workers, Broken()).ran()
        sentences.append(str(caught.value).partition("; lower")[2])
    assert sentences[0] == sentences[1]


def test_what_a_reward_failed_on_is_counted_here(base, data):
    found = Setting(base, data, 2)
    found.collector.collect(found.layer, 0)
    assert found.rewards.failures.calls >= 24


def test_too_few_parts_and_too_small_a_budget_are_one_sentence(base, data, monkeypatch):
    found = Setting(base, data, 1)

    def opening(*given, **named):
        from contextlib import nullcontext

        return nullcontext(WorkersHere(lambda: Loaded(given[2][0], base), given[0].workers))

    monkeypatch.setattr("moe_bias.cluster.policy.opened", opening)

    def opened(workers, **own):
        config = RLConfig(**{**USUAL, **own})
        cluster, model = Cluster(workers=workers), named_model(base)
        with policy_pool(cluster, model, found.layer, data, found.rewards, config, found.objective):
            pass

    opened(3)
    with pytest.raises(UserError, match="`batch_size` 2 cuts the 6 problems of a step into 3 parts, fewer than the 4"):
        opened(4)
    with pytest.raises(UserError, match="`sample_budget` 1000 B does not hold a worker's share of a step, up to"):
        opened(2, sample_budget=1000)
