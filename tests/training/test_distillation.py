"""Distillation from a target: loss and gradient of the layer against both whole softmaxes, and a training with it."""

from dataclasses import dataclass, replace

import pytest
import torch

from helpers.models import VOCABULARY, tiny_model
from helpers.objectives import gradients_of, problem, rows_of
from helpers.training import features_of, head_of, layer_of, lines_of, run_settings
from moe_bias.backbone import find_head
from moe_bias.chunks import AtOnce
from moe_bias.config import SFTConfig
from moe_bias.divergence import full_divergences, target_scalars
from moe_bias.features import adapted as adapted_module
from moe_bias.features.adapted import adapted_policy
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.extract import HiddenTokens, with_scalars
from moe_bias.features.target import TargetTokens, with_target
from moe_bias.mistakes import UserError
from moe_bias.support import full_stats
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.gradients import gradients, mean_loss
from moe_bias.training.objective_trial import check_objective
from moe_bias.training.objectives import Distillation, Objective, Supervised, Terms
from moe_bias.training.sft import fit, train

WIDER = 24
"""The target's hidden size, unlike the draft's."""


@dataclass(frozen=True)
class Everything(Objective):
    """Reads all that an objective can."""

    needs_stats = True
    needs_target = True

    def __call__(self, now, then):
        return Terms(now.forward_kl + 0.5 * now.reverse_kl - 0.3 * now.log_prob + 0.7 * now.kl - 0.2 * now.entropy)


def with_random_target(p):
    """A problem's features with a target's, and the target's whole logits."""
    generator = torch.Generator().manual_seed(5)
    target_TV = 3 * torch.randn(len(p.features), VOCABULARY, generator=generator, dtype=torch.float64)
    scalars = target_scalars(target_TV, p.logits, p.features.support)
    tokens = TargetTokens(torch.zeros(len(p.features), WIDER), scalars)
    p.features = replace(p.features, target=tokens)
    return target_TV


def full_loss(p, target_TV, objective):
    """The objective by both whole softmaxes, with its graph; the load balance left out."""
    support_M = p.features.support
    bias_TM = p.layer.strength * p.layer(p.features.hidden, p.features.entropy).bias
    move_TM = p.head.transform.reachable(p.logits[:, support_M], bias_TM)
    both = full_divergences(target_TV, p.logits, move_TM, support_M)
    if isinstance(objective, Distillation):
        return ((1 - objective.reverse) * both.forward + objective.reverse * both.reverse).mean()
    stats = full_stats(p.logits, move_TM, support_M)
    adapted_TV = p.logits.index_add(-1, support_M, move_TM)
    log_prob_T = adapted_TV.log_softmax(-1).gather(-1, p.features.token[:, None]).squeeze(-1)
    return (both.forward + 0.5 * both.reverse - 0.3 * log_prob_T + 0.7 * stats.kl - 0.2 * stats.entropy).mean()


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("elements", [1, 58 * 7, 10**9])
@pytest.mark.parametrize("objective", [Distillation(), Distillation(0.3), Everything()])
def test_loss_and_gradient_are_those_of_both_whole_softmaxes(monkeypatch, name, elements, objective):
    p = problem(name, temperature=1.0, load_balance_weight=0.0)
    target_TV = with_random_target(p)
    expected = full_loss(p, target_TV, objective)
    expected.backward()
    wanted = gradients_of(p.layer)
    p.layer.zero_grad()
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(elements, elements))
    logits_of, target_of = (rows_of(logits_TV[:, p.features.support]) for logits_TV in (p.logits, target_TV))
    loss = gradients(p.layer, p.features, logits_of, p.head.transform, objective, target_of=target_of)
    torch.testing.assert_close(loss.total, expected.detach(), rtol=1e-9, atol=1e-9)
    for key, gradient in gradients_of(p.layer).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-8, atol=1e-10, msg=key)
    found = mean_loss(p.layer, p.features, logits_of, p.head.transform, objective, target_of)
    assert found == pytest.approx(float(expected.detach()), rel=1e-9)


def test_at_another_temperature_all_is_of_the_scaled_logits():
    p = problem(temperature=0.7, load_balance_weight=0.0)
    target_TV = with_random_target(p)
    support_M = p.features.support
    move_TM = p.layer.strength * p.layer(p.features.hidden, p.features.entropy).bias / 0.7
    expected = full_divergences(target_TV, p.logits, move_TM, support_M).forward.mean()
    logits_of, target_of = (rows_of(logits_TV[:, support_M]) for logits_TV in (p.logits, target_TV))
    loss = gradients(
        p.layer, p.features, logits_of, p.head.transform, Distillation(), temperature=0.7, target_of=target_of
    )
    torch.testing.assert_close(loss.total, expected.detach(), rtol=1e-9, atol=1e-9)


def two_models(tokens=61):
    """Features of a draft with those of a wider target of the same vocabulary, and both heads."""
    draft, target = head_of(), find_head(tiny_model("qwen2", hidden_size=WIDER, head_dim=12))[1]
    source = features_of(draft, tokens)
    # the target knows what the draft's hidden state tells of the token, in more numbers
    wide_TD = torch.cat([source.hidden, source.hidden[:, : WIDER - source.hidden.shape[1]]], dim=-1)
    of_target = with_scalars(target, HiddenTokens(wide_TD, source.token, source.example), range(VOCABULARY), "test")
    return with_target(source, of_target, draft, target, "test"), draft, target


def test_the_scalars_of_two_heads_are_those_of_their_logits():
    source, draft, target = two_models()
    batch = source.at(slice(None))
    found = batch.target.scalars
    wanted = target_scalars(target.logits(batch.target.hidden), draft.logits(batch.hidden), batch.support)
    for name in ("log_partition", "rest_mass", "forward_rest", "reverse_rest"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), msg=name)
    part = source.at(torch.tensor([7, 3]))
    assert torch.equal(part.target.hidden, batch.target.hidden[[7, 3]])
    assert torch.equal(part.target.scalars.rest_mass, found.rest_mass[[7, 3]])


@pytest.mark.parametrize("budget", [0, 2**30])
def test_training_brings_the_draft_nearer_and_measures_it_exactly(budget):
    source, draft, target = two_models()
    settings = SFTConfig(epochs=30, batch_tokens=16, experts="free", expert_rate=0.1, logits_budget=budget)
    layer = layer_of()
    report = fit(layer, source, draft, settings, "test", held_out=source, objective=Distillation(), target=target)
    batch = source.at(slice(None))
    logits_TV, target_TV = draft.logits(batch.hidden), target.logits(batch.target.hidden)
    bias_TM = layer(batch.hidden, batch.entropy).bias
    before = full_divergences(target_TV, logits_TV, torch.zeros_like(bias_TM), batch.support).forward.mean()
    after = full_divergences(target_TV, logits_TV, bias_TM, batch.support).forward.mean()
    assert after < 0.8 * before
    assert report.held_out_nll == pytest.approx(float(after.detach()), rel=1e-5)


def test_a_run_in_a_folder_writes_divergences_and_goes_on(tmp_path):
    source, draft, target = two_models()
    settings = run_settings(tmp_path, epochs=2)
    runs = []
    for name, cut in (("whole", False), ("cut", True)):
        folder, layer = tmp_path / name, layer_of()
        made_with = settings.model_dump(mode="json")
        arguments = (source, source, draft, settings, Checkpoints(folder, 2, 2), made_with)
        if cut:
            stop = type("Stop", (), {"on_step": lambda self, step, metrics, layer: step == 4})()
            train(layer, *arguments, objective=Distillation(), target=target, callbacks=[stop])
            layer = layer_of()
        train(layer, *arguments, objective=Distillation(), target=target)
        runs.append(layer.state_dict())
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name
    lines = lines_of(tmp_path / "whole")
    assert lines[1]["loss"] == pytest.approx(lines[1]["forward_kl"] + 0.01 * lines[1]["load_balance"], rel=1e-5)
    assert {"held_out_loss"} <= set(lines[0])
    assert "nll" not in lines[1]


def test_an_objective_without_a_target_to_come_nearer_to_is_refused():
    with pytest.raises(UserError, match="Distillation needs a target model to come nearer to"):
        check_objective(Distillation(), with_samples=False)
    with pytest.raises(UserError, match="Distillation needs a target model"):
        fit(layer_of(), features_of(head_of()), head_of(), SFTConfig(), "test", objective=Distillation())
    with pytest.raises(UserError, match=r"`reverse` = 1\.5: it must be a weight from 0 to 1"):
        Distillation(1.5)


def test_divergences_are_not_there_for_an_objective_that_does_not_say_so():
    class Unsaid(Objective):
        def __call__(self, now, then):
            return Terms(now.forward_kl)

    with pytest.raises(UserError, match=r"failed on a first trial .*needs_target = True"):
        check_objective(Unsaid(), with_samples=False)


def test_the_likelihood_under_a_target_costs_no_target():
    """Any other objective trains on the same features as before."""
    source, draft, target = two_models()
    plain, beside = layer_of(), layer_of()
    settings = SFTConfig(epochs=1, batch_tokens=16)
    fit(plain, source.source, draft, settings, "test", objective=Supervised())
    fit(beside, source, draft, settings, "test", objective=Supervised())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, beside.state_dict()[name])
    kept = BaseLogits(source, target, 2**20, lambda batch: batch.target.hidden)
    batch = source.at(torch.tensor([4, 9]))
    found = kept.of(torch.tensor([4, 9]), batch)(slice(None))
    torch.testing.assert_close(found, target.logits(batch.target.hidden)[:, batch.support])
    assert adapted_policy(plain, batch, found, draft.transform).log_prob.shape == (2,)
