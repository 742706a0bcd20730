"""The loop: optimiser, kept logits, early stopping, what stops a run, metrics, and several processes."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import training_processes
from helpers.models import HIDDEN, randomise
from helpers.training import features_of, head_of, layer_of, lines_of, run_settings
from helpers.training_processes import train_in
from moe_bias.config import SFTConfig
from moe_bias.evaluation.likelihood import token_nll
from moe_bias.features.base_logits import BaseLogits
from moe_bias.layer import Routing
from moe_bias.mistakes import UserError
from moe_bias.training import metrics
from moe_bias.training.batches import batches
from moe_bias.training.held_out import mean_nll
from moe_bias.training.loop import Watching
from moe_bias.training.metrics import MetricsLog, router_use
from moe_bias.training.objectives import Objective, Supervised, Terms
from moe_bias.training.optimisation import Optimisation, dropped_experts, rate_factor
from moe_bias.training.processes import ALONE
from moe_bias.training.sft import NORMALISATION_TOKENS, fit, start
from moe_bias.training.trainer import Trainer


def test_rates_by_hand():
    # 10 steps, a fifth of them rising: 1/2, 2/2, then (10 - step) / 8, capped by the rise.
    factors = [rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors == [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rate_factor(0, 1, 0.03) == 1.0


def test_first_step_of_adamw_by_hand():
    # Adam's first step is the rate times the gradient's sign; the decay takes rate * decay * weight before it.
    layer = layer_of(num_experts=2, support=[1, 2])
    torch.nn.init.constant_(layer.experts, 2.0)
    router = layer.router.weight.detach().clone()
    settings = SFTConfig(expert_rate=0.1, router_rate=0.01, weight_decay=0.5, max_grad_norm=1e9, warmup=0)
    optimisation = Optimisation(layer, settings, 10)
    layer.experts.grad = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    layer.router.weight.grad = torch.ones_like(router)
    norms = optimisation.norms()
    assert (norms.experts, norms.router) == (5.0, pytest.approx(math.sqrt(2 * HIDDEN)))
    assert norms.total == pytest.approx(math.sqrt(25 + 2 * HIDDEN))
    optimisation.step(0)
    expected = torch.tensor([[1.9 - 0.1, 1.9 + 0.1], [1.9, 1.9]])
    torch.testing.assert_close(layer.experts.detach(), expected)
    torch.testing.assert_close(layer.router.weight.detach(), router - 0.01)


def test_gradients_are_clipped_to_the_norm():
    layer = layer_of(num_experts=1, top_k=1, support=[1, 2], entropy_gate=False)
    optimisation = Optimisation(layer, SFTConfig(max_grad_norm=1.0), 10)
    layer.experts.grad = torch.tensor([[3.0, 4.0]])
    optimisation.step(0)
    torch.testing.assert_close(layer.experts.grad, torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=0)


def test_dropout_leaves_entries_out_and_puts_them_back():
    layer = layer_of()
    randomise(layer)
    whole_EM = layer.experts.detach().clone()
    with dropped_experts(layer, 0.25, seed=3, step=5):
        during_EM = layer.experts.detach().clone()
        layer.experts.sum().backward()
    assert torch.equal(layer.experts.detach(), whole_EM)
    dropped = during_EM == 0
    torch.testing.assert_close(during_EM[~dropped], whole_EM[~dropped] / 0.75)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.07)
    torch.testing.assert_close(layer.experts.grad, torch.where(dropped, 0, 1 / 0.75))
    for seed, step, same in ((3, 5, True), (3, 6, False), (4, 5, False)):
        with dropped_experts(layer, 0.25, seed, step):
            assert torch.equal(layer.experts.detach() == 0, dropped) is same


def test_every_epoch_has_every_token_once_and_a_later_start_sees_the_same_rest():
    whole = list(batches(10, 4, epochs=3, seed=5))
    assert [len(index) for index in whole] == [4, 4, 2] * 3
    orders = [torch.cat(whole[first : first + 3]).tolist() for first in (0, 3, 6)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    for first in range(10):
        rest = list(batches(10, 4, epochs=3, seed=5, first_step=first))
        assert len(rest) == 9 - first
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kept_logits_are_the_recomputed_ones(name):
    head = head_of(name)
    features = features_of(head)
    needed = 4 * len(features) * len(features.support)
    kept, again = BaseLogits(features, head, needed), BaseLogits(features, head, needed - 1)
    assert (kept.nbytes, again.nbytes) == (needed, 0)
    index = torch.tensor([5, 60, 0, 5])
    batch = features.at(index)
    for rows in (slice(0, 2), slice(1, 4), slice(None)):
        torch.testing.assert_close(kept.of(index, batch)(rows), again.of(index, batch)(rows), rtol=1e-6, atol=1e-6)


def test_a_run_ends_alike_with_logits_kept_and_recomputed():
    head = head_of()
    features = features_of(head)
    layers = []
    for budget in (2**20, 0):
        layer = layer_of()
        fit(layer, features, head, SFTConfig(epochs=3, batch_tokens=16, logits_budget=budget), "test")
        layers.append(layer)
    torch.testing.assert_close(layers[0].experts, layers[1].experts, rtol=1e-4, atol=1e-5)


def test_held_out_nll_is_that_of_the_measure():
    head, layer = head_of(), layer_of()
    randomise(layer)
    features = features_of(head)
    expected = float(token_nll(layer, features, head).mean())
    assert mean_nll(layer, features, BaseLogits(features, head, 0), head.transform) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("normalisation", "mean", "scale"), [("standardise", 2.0, math.sqrt(2)), ("rms", 0.0, math.sqrt(5)), ("none", 0, 1)]
)
def test_normalisation_by_hand(normalisation, mean, scale):
    # 1 and 3: mean 2, standard deviation sqrt(2) with n - 1, root mean square sqrt((1 + 9) / 2).
    layer = layer_of()
    layer.calibrate(torch.tensor([[1.0], [3.0]]).expand(2, HIDDEN), normalisation)
    torch.testing.assert_close(layer.hidden_mean, torch.full((HIDDEN,), float(mean)))
    torch.testing.assert_close(layer.hidden_scale, torch.full((HIDDEN,), float(scale)))


class Long:
    """A source of ten times as many tokens as the normalisation is measured on; remembers what is read."""

    def __len__(self):
        return 10 * NORMALISATION_TOKENS

    def at(self, index):
        self.read = index
        return SimpleNamespace(hidden=torch.randn(len(index), HIDDEN))


def test_start_reads_few_tokens_from_all_over_the_source():
    source, layer = Long(), layer_of()
    start(layer, source, SFTConfig(gate_alpha=2.0, gate_beta=-1.0))
    assert torch.equal(source.read, torch.arange(NORMALISATION_TOKENS) * 10)
    assert (layer.entropy_gate.weight.item(), layer.entropy_gate.bias.item()) == (2.0, -1.0)


def test_early_stopping_ends_with_the_best_layer():
    head, layer = head_of(), layer_of()
    features = features_of(head)
    seen, nlls = [], iter([5.0, 4.0, 3.0, 3.5, 3.0, 1.0])  # a tie is not better

    def scripted(layer):
        seen.append(layer.experts.detach().clone())
        return next(nlls)

    settings = SFTConfig(epochs=9, batch_tokens=16)
    report = fit(layer, features, head, settings, "test", Watching(scripted, evaluate_every=2, patience=2))
    assert (report.steps, report.layer_step, report.held_out_nll) == (8, 4, 3.0)
    assert torch.equal(layer.experts.detach(), seen[2])


def test_without_patience_the_last_layer_stays():
    head, layer = head_of(), layer_of()
    features, nlls = features_of(head), iter([5.0, 1.0, 2.0, 3.0])
    watching = Watching(lambda layer: next(nlls))
    report = fit(layer, features, head, SFTConfig(epochs=3, batch_tokens=16), "test", watching)
    assert (report.steps, report.layer_step, report.held_out_nll) == (12, 12, 3.0)


def test_metrics_of_every_step(tmp_path):
    head = head_of()
    features = features_of(head)
    train_in(layer_of(), features, features, head, run_settings(tmp_path, evaluate_every=5))
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(13))  # 61 tokens by 16: 4 steps an epoch
    assert [line["step"] for line in lines if "held_out_nll" in line] == [0, 5, 10, 12]
    base = float(token_nll(None, features, head).mean())
    assert lines[0] == {"step": 0, "held_out_nll": pytest.approx(base, rel=1e-6)}
    assert lines[-1]["held_out_nll"] < base
    first = lines[1]
    assert first["loss"] == pytest.approx(first["nll"] + 0.01 * first["load_balance"])
    assert (first["gate_alpha"], first["gate_beta"]) == (pytest.approx(1.0, abs=0.01), pytest.approx(0.0, abs=0.01))
    assert first["expert_rate"] == 0.02  # of free experts
    assert first["grad_norm_experts"] > 0
    assert first["grad_norm_router"] >= 0
    assert first["tokens_per_second"] > 0


def test_router_use_by_hand():
    # Entropies ln 2 and 0; of four experts the first two are used.
    probs = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]])
    gates = torch.tensor([[0.0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    entropy, used = router_use(Routing(probs, gates), ALONE)
    assert entropy == pytest.approx(math.log(2) / 2)
    assert used == 0.5


def test_metrics_go_on_after_the_checkpoint_and_drop_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path, after=0)
    for step in range(1, 5):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    log = MetricsLog(tmp_path, after=3)
    log.write(4, {"loss": 40.0})
    log.close()
    assert [line["loss"] for line in lines_of(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    made = []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step, self))
            self.scalars, self.closed = [], False

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def close(self):
            self.closed = True

    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    log = MetricsLog(tmp_path, after=0)
    log.write(1, {"loss": 2.0})
    log.close()
    folder, purge_step, writer = made[0]
    assert (folder, purge_step) == (str(tmp_path / "tensorboard"), 1)
    assert (writer.scalars, writer.closed) == ([("loss", 2.0, 1)], True)


class Spoilt(Objective):
    """The supervised loss, changed from the `at_step`-th call on; the first is the trial before the run."""

    def __init__(self, change, at_step):
        self.change, self.calls, self.at_step = change, -1, at_step

    def __call__(self, now, then):
        self.calls += 1
        terms = Supervised()(now, then)
        return Terms(self.change(terms.loss), terms.metrics) if self.calls >= self.at_step else terms


def steep(loss):
    """Of the same value, with a gradient that no float32 holds."""
    difference = loss - loss.detach()
    return loss.detach() + difference * 3e38 * 3e38


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda loss: loss * math.nan,
            r"the loss became nan; lower `expert_rate` \(0.02\) or `router_rate` \(0.003\)",
        ),
        (lambda loss: loss * 0 + 1234.0, r"the loss 1234 is above `loss_bound` 100; lower `expert_rate`"),
        (steep, r"the norm of the gradients became (inf|nan); lower `expert_rate`"),
    ],
)
def test_a_bad_step_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, change, cause):
    head, layer = head_of(), layer_of()
    features = features_of(head)
    found = rf"training stopped at step 6 of 12: {cause}.*; the last good checkpoint is .*step-00000004.safetensors$"
    with pytest.raises(UserError, match=found):
        train_in(layer, features, features, head, run_settings(tmp_path), objective=Spoilt(change, 6))
    assert torch.isfinite(layer.experts).all()


def test_a_bad_step_before_any_checkpoint_says_so(tmp_path):
    head = head_of()
    features = features_of(head)
    spoilt = Spoilt(lambda loss: loss * math.inf, 1)
    with pytest.raises(UserError, match=r"step 1 of 12: the loss became inf.*; there is no checkpoint yet"):
        train_in(layer_of(), features, features, head, run_settings(tmp_path), objective=spoilt)


def test_a_batch_that_is_not_finite_is_named_as_the_cause():
    head, layer = head_of(), layer_of()
    features = features_of(head)
    features.logit[7] = math.nan
    runner = Trainer(layer, features, head, SFTConfig(epochs=1, batch_tokens=61))
    features.column[7] = -1
    with pytest.raises(UserError, match="its hidden states, logits or entropies are not finite; extract them again"):
        runner.run("test")


@pytest.mark.parametrize("batch_tokens", [16, 60])
def test_two_processes_are_one_on_the_same_batches(tmp_path, batch_tokens):
    """With 60, the second batch of each epoch is one token: one process has none."""
    choices = {"epochs": 2, "batch_tokens": batch_tokens, "evaluate_every": 3, "expert_dropout": 0.1}
    alone, both = tmp_path / "alone", tmp_path / "both"
    training_processes.run_training(alone, choices)
    training_processes.run_two(both, choices)
    one, two = (training_processes.adapter(folder) for folder in (alone, both))
    for name, tensor in one.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6 * scale, msg=name)
    for ours, theirs in zip(lines_of(alone), lines_of(both), strict=True):
        ours.pop("tokens_per_second", None), theirs.pop("tokens_per_second", None)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
