"""Objectives: DPO against the full softmax and TRL, one's own objectives, units of answers and pairs, callbacks."""

import copy
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import moe_bias
from helpers.models import VOCABULARY, tiny_model
from helpers.objectives import gradients_of, problem, rows_of
from helpers.reinforcement import Setting, settings_of
from helpers.training import features_of, head_of, layer_of, lines_of, run_settings
from helpers.training_processes import train_in
from moe_bias.backbone import find_head
from moe_bias.chunks import AtOnce
from moe_bias.config import SFTConfig
from moe_bias.features import adapted as adapted_module
from moe_bias.features.adapted import adapted_policy
from moe_bias.mistakes import UserError
from moe_bias.support import full_log_prob
from moe_bias.tasks.conversations import Example
from moe_bias.training.batches import Units, batches, mixed_seed, whole_units
from moe_bias.training.gradients import gradients, mean_loss, plain_loss
from moe_bias.training.loop import Watching
from moe_bias.training.objective_trial import check_objective
from moe_bias.training.objectives import DAPO, DPO, Now, Objective, Sampled, Supervised, Terms, Then
from moe_bias.training.sft import fit, fresh_layer, prepare

LENGTHS = [7, 3, 1, 12, 20, 18]
"""Tokens of three pairs of answers, 61 together."""


def pairs_problem(name="llama"):
    p = problem(name, temperature=1.0, load_balance_weight=0.2)
    p.features = replace(p.features, example=torch.arange(6).repeat_interleave(torch.tensor(LENGTHS)))
    return p


def full_dpo(p, beta):
    """DPO by the full softmax of policy and base, in float64, with its graph."""
    support_M = p.features.support
    bias_TM = p.layer.strength * p.layer(p.features.hidden, p.features.entropy).bias
    move_TM = p.head.transform.reachable(p.logits[:, support_M], bias_TM)
    log_prob_T = full_log_prob(p.logits, move_TM, support_M, p.features.token)
    base_T = full_log_prob(p.logits, torch.zeros_like(move_TM), support_M, p.features.token)
    sums = [part.sum() for part in (log_prob_T - base_T).split(LENGTHS)]
    margin_N = beta * torch.stack([sums[0] - sums[1], sums[2] - sums[3], sums[4] - sums[5]])
    return -F.logsigmoid(margin_N).mean(), margin_N


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("elements", [1, 58 * 7, 10**9])
def test_dpo_and_its_gradient_are_those_of_the_full_softmax(monkeypatch, name, elements):
    p = pairs_problem(name)
    logits_TM = p.logits[:, p.features.support]
    balance = plain_loss(
        DPO(), adapted_policy(p.layer, p.features, logits_TM, p.head.transform), Then(p.features), 0.2
    ).load_balance
    expected, margin_N = full_dpo(p, 0.3)
    (expected + 0.2 * balance).backward()
    wanted = gradients_of(p.layer)
    p.layer.zero_grad()
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(elements, elements))
    loss = gradients(p.layer, p.features, rows_of(logits_TM), p.head.transform, DPO(0.3))
    torch.testing.assert_close(loss.total, (expected + 0.2 * balance).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.metrics["margin"], margin_N.mean().detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.metrics["preferred"], (margin_N > 0).double().mean())
    assert (float(loss.units), len(loss.log_prob)) == (3.0, 61)
    for key, gradient in gradients_of(p.layer).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-8, atol=1e-10, msg=key)
    found = mean_loss(p.layer, p.features, rows_of(logits_TM), p.head.transform, DPO(0.3))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_a_process_without_a_pair_takes_part_with_zeros():
    p = pairs_problem()
    nothing = p.features.at(slice(0, 0))
    logits_TM = p.logits[:0, p.features.support]
    loss = gradients(p.layer, nothing, rows_of(logits_TM), p.head.transform, DPO(), total=lambda x: x)
    assert float(loss.total) == 0
    assert all((gradient == 0).all() for gradient in gradients_of(p.layer).values())


def test_dpo_in_another_order_of_tokens_is_the_same():
    """Which answer a token is of is all that counts."""
    p = pairs_problem()
    logits_TM, order = p.logits[:, p.features.support], torch.randperm(61)
    losses = [
        mean_loss(p.layer, p.features.at(index), lambda rows, i=index: logits_TM[i][rows], p.head.transform, DPO())
        for index in (torch.arange(61), order)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("objective", [Supervised(0.7), DAPO(kl_weight=0.3, entropy_weight=0.1), DPO(0.5)])
def test_gradients_of_objectives_are_those_of_differences(objective):
    p = pairs_problem()

    def losses(log_prob_T, entropy_T, kl_T):
        now = Now(log_prob_T, SimpleNamespace(entropy=entropy_T, kl=kl_T))
        return objective(now, Then(p.features, p.sampled)).loss

    generator = torch.Generator().manual_seed(3)
    columns = [-2 * torch.rand(61, generator=generator, dtype=torch.float64) for _ in range(3)]
    p.sampled = Sampled(columns[0] + 0.05, p.sampled.advantage)
    assert torch.autograd.gradcheck(losses, [column.requires_grad_() for column in columns])


def test_the_gradient_of_dpo_is_that_of_differences_of_the_layer(monkeypatch):
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(58 * 7, 58 * 7))
    p = pairs_problem()
    logits_TM = p.logits[:, p.features.support]
    gradients(p.layer, p.features, rows_of(logits_TM), p.head.transform, DPO(0.3))
    direction = torch.randn_like(p.layer.experts)
    slope = float((p.layer.experts.grad * direction).sum())
    values = []
    for step in (1e-5, -1e-5):
        moved = copy.deepcopy(p.layer)
        moved.experts.data.add_(step * direction)
        values.append(mean_loss(moved, p.features, rows_of(logits_TM), p.head.transform, DPO(0.3)))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def trl_dpo_loss(log_prob_NL, base_N, mask_NL, beta):
    """TRL's own `_compute_loss` on the log-probabilities of a batch, chosen answers first."""
    trl = pytest.importorskip("trl")
    from accelerate import Accelerator

    nothing_NL = torch.zeros_like(log_prob_NL)
    outputs = SimpleNamespace(
        log_probs=log_prob_NL, entropy=nothing_NL, mean_logits=nothing_NL, is_top1=nothing_NL.bool()
    )
    trainer = object.__new__(trl.DPOTrainer)
    vars(trainer).update(
        accelerator=Accelerator(cpu=True),
        aux_loss_enabled=False,
        beta=beta,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen_N, rejected_N = base_N.chunk(2)
    with_prompt_NL = F.pad(mask_NL, (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(with_prompt_NL),
        "attention_mask": torch.ones_like(with_prompt_NL),
        "completion_mask": with_prompt_NL,
        "ref_chosen_logps": chosen_N,
        "ref_rejected_logps": rejected_N,
    }
    loss = trainer._compute_loss(lambda **_: outputs, inputs, False)
    return loss, trainer._metrics["train"]["rewards/accuracies"][0]


def test_dpo_is_trl_s_on_the_same_log_probabilities():
    p = pairs_problem()
    p.features = replace(p.features, logit=p.features.logit + 0.3)
    log_prob_T = -3 * torch.rand(61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_prob_T.requires_grad_()
    then = Then(p.features)
    padded = [
        torch.nn.utils.rnn.pad_sequence(part.split(LENGTHS), batch_first=True)
        for part in (log_prob_T, torch.ones(61, dtype=torch.int64))
    ]
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    theirs, accuracy = trl_dpo_loss(padded[0][order], then.per_answer(then.base_log_prob)[order], padded[1][order], 0.2)
    ours = DPO(0.2)(Now(log_prob_T), then)
    torch.testing.assert_close(ours.loss.mean(), theirs)
    assert float(ours.metrics["preferred"].double().mean()) == pytest.approx(accuracy)
    (expected,), (found,) = (torch.autograd.grad(loss, log_prob_T) for loss in (theirs, ours.loss.mean()))
    torch.testing.assert_close(found, expected)


def test_a_fresh_layer_is_indifferent():
    p = pairs_problem()
    p.layer.experts.data.zero_()
    found = mean_loss(p.layer, p.features, lambda rows: p.logits[rows][:, p.features.support], p.head.transform, DPO())
    assert found == pytest.approx(0.6931471805599453, rel=1e-12)


# --- training on pairs ------------------------------------------------------------------------------


def preferring(low_is_better=True, pairs=24):
    """Pairs of answers to the same prompt, of low words and of high ones, of one to six tokens."""
    generator = torch.Generator().manual_seed(0)

    def words(low, high):
        length = int(torch.randint(1, 7, (), generator=generator))
        return torch.randint(low, high, (length,), generator=generator).tolist()

    found = []
    for _ in range(pairs):
        prompt, low, high = words(3, VOCABULARY), [*words(3, 40), 2], [*words(40, VOCABULARY), 2]
        found += [Example(prompt, side) for side in ((low, high) if low_is_better else (high, low))]
    return found


def test_preferences_are_learnt_from_features(tmp_path):
    model = tiny_model()
    head = find_head(model)[1]
    examples = preferring()
    choices = {"support": "all", "epochs": 12, "batch_tokens": 24, "evaluate_every": 10, "patience": 50}
    settings = run_settings(tmp_path, experts="free", expert_rate=0.1, **choices)
    prepared = prepare(model, head, examples[:32], examples[32:], settings, always=[2], batch_size=4)
    layer = fresh_layer(settings, prepared.support, head)
    report = train_in(layer, prepared.train, prepared.held_out, head, settings, objective=DPO(0.5))
    lines = lines_of(tmp_path)
    assert lines[0]["held_out_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert report.held_out_nll < 0.6
    assert lines[1]["preferred"] <= 1
    assert lines[-1]["margin"] > 0.5
    assert "nll" not in lines[1]
    tokens = sum(line["tokens"] for line in lines[1:])
    assert tokens == 12 * len(prepared.train)
    again = fresh_layer(settings, prepared.support, head)
    with pytest.raises(UserError, match=r"holds an unfinished run with other objective"):
        train_in(again, prepared.train, prepared.held_out, head, settings, objective=DPO(0.4))


def test_a_batch_is_of_whole_pairs_and_an_epoch_of_all_tokens():
    example_T = torch.tensor([0, 0, 1, 4, 5, 5, 5, 2, 3, 3])
    units = Units.of(example_T, "pair")
    assert units.count == 3
    assert units.in_a_batch(7) == 2
    parts = list(batches(3, 2, epochs=1, seed=0))
    tokens = [units.tokens_of(part).tolist() for part in parts]
    assert sorted(token for part in tokens for token in part) == list(range(10))
    for part in tokens:
        inside = set((example_T[part] // 2).tolist())
        assert len(part) == int(torch.isin(example_T // 2, torch.tensor(sorted(inside))).sum())
    assert Units.of(example_T, "answer").count == 6
    assert Units.of(example_T[:0], "pair").tokens_of(torch.arange(0)).tolist() == []


def test_answers_that_are_not_whole_are_refused():
    """As those of a store that keeps the tokens of highest entropy alone."""
    features = features_of(head_of()).at(torch.arange(0, 61, 2))
    with pytest.raises(UserError, match="4 of the 7 tokens of example 0 are there; an objective of answers needs all"):
        fit(layer_of(), features, head_of(), SFTConfig(), "test", objective=MeanOfAnswers())


def test_an_answer_without_the_other_one_is_named():
    with pytest.raises(UserError, match="example 4 is without the other one of its pair, example 5"):
        Units.of(torch.tensor([2, 3, 3, 4]), "pair")
    p = pairs_problem()
    with pytest.raises(UserError, match="example 0 is without the other one"):
        Then(p.features.at(slice(0, 7))).units("pair")


def test_the_first_tokens_are_of_whole_pairs():
    example_T = torch.tensor([0, 0, 1, 2, 3, 3])
    assert [whole_units(example_T, count, "pair") for count in (3, 4, 5, 6, 9)] == [3, 3, 3, 6, 6]
    assert [whole_units(example_T, count, "token") for count in (1, 9)] == [1, 6]
    with pytest.raises(UserError, match="`train_tokens` = 2 holds no whole pair"):
        whole_units(example_T, 2, "pair")


def test_seeds_of_several_numbers_are_those_that_runs_were_made_with():
    assert [mixed_seed(0), mixed_seed(3, 5), mixed_seed(5, 3)] == [2968811710, 3746004709, 727168946]


# --- one's own ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Focal(Objective):
    """Likely tokens count less."""

    power: float = 2.0

    def __call__(self, now: Now, then: Then) -> Terms:
        """One loss a token."""
        missed_T = 1 - now.log_prob.exp()
        return Terms(-(missed_T**self.power) * now.log_prob, {"missed": missed_T})


class MeanOfAnswers(Objective):
    """The supervised loss with each answer counting alike."""

    unit = "answer"

    def __call__(self, now, then):
        lengths_A = then.per_answer(torch.ones_like(now.log_prob))
        return Terms(-then.per_answer(now.log_prob) / lengths_A)


@pytest.mark.parametrize("objective", [Focal(), MeanOfAnswers()])
def test_one_s_own_objective_trains_and_logs(objective, tmp_path):
    head, layer = head_of(), layer_of()
    features = features_of(head)
    train_in(layer, features, features, head, run_settings(tmp_path, epochs=8), objective=objective)
    lines = lines_of(tmp_path)
    assert lines[-1]["loss"] < lines[1]["loss"]
    assert ("missed" in lines[1]) == isinstance(objective, Focal)


@pytest.mark.parametrize("objective", [Focal(), MeanOfAnswers()])
@pytest.mark.parametrize("elements", [1, 58 * 7, 10**9])
def test_one_s_own_objective_has_the_gradient_of_autograd(monkeypatch, elements, objective):
    p = pairs_problem()
    logits_TM = p.logits[:, p.features.support]
    adapted = adapted_policy(p.layer, p.features, logits_TM, p.head.transform)
    whole = plain_loss(objective, adapted, Then(p.features), 0.2)
    whole.total.backward()
    wanted = gradients_of(p.layer)
    p.layer.zero_grad()
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(elements, elements))
    loss = gradients(p.layer, p.features, rows_of(logits_TM), p.head.transform, objective)
    torch.testing.assert_close(loss.total, whole.total.detach())
    for key, gradient in gradients_of(p.layer).items():
        torch.testing.assert_close(gradient, wanted[key], msg=key)


class NoStats(Objective):
    def __call__(self, now, then):
        return Terms(now.kl)


class Constant(Objective):
    def __call__(self, now, then):
        return Terms(torch.zeros_like(now.log_prob.detach()))


class OneNumber(Objective):
    def __call__(self, now, then):
        return Terms(-now.log_prob.mean())


class NotTerms(Objective):
    def __call__(self, now, then):
        return -now.log_prob


class Faulty(Objective):
    def __call__(self, now, then):
        return Terms(now.logprob)


class Words(OneNumber):
    unit = "word"


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (
            NoStats(),
            r"NoStats failed on a first trial \(entropy and KL are there for an objective that says `needs_stats",
        ),
        (Constant(), "Constant: the loss does not depend on `now`"),
        (OneNumber(), r"OneNumber: the loss has shape \(\), not \(4,\), one number for each token"),
        (NotTerms(), r"NotTerms gave Tensor, not Terms\(loss, metrics\)"),
        (Faulty(), r"Faulty failed on a first trial \('Now' object has no attribute 'logprob'\)"),
        (Words(), "Words: `unit` is 'word'; known are token, answer, pair"),
        (lambda now, then: now, "is none: make it a subclass of Objective"),
        (DAPO(), r"DAPO failed on a first trial \(advantages and sampled log-probabilities are there in reinforcement"),
    ],
)
def test_objectives_that_cannot_be_used_are_refused_before_training(objective, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(layer_of(), features_of(head_of()), head_of(), SFTConfig(), "test", objective=objective)


@pytest.mark.parametrize(("beta", "sentence"), [(0.0, "`beta` = 0.0"), (float("nan"), "`beta` = nan")])
def test_unusable_terms_of_dpo_and_supervised_are_refused(beta, sentence):
    with pytest.raises(UserError, match=sentence):
        DPO(beta)
    with pytest.raises(UserError, match="`kl_weight` = -1"):
        Supervised(-1)


def test_terms_of_the_usual_objective_beside_another_are_refused():
    features = features_of(head_of())
    with pytest.raises(UserError, match=r"`kl_weight` = 0.5 is of the usual objective; give it to your own"):
        fit(layer_of(), features, head_of(), SFTConfig(kl_weight=0.5), "test", objective=Focal())
    with pytest.raises(UserError, match=r"`eps_high` = 0.5 is of the usual objective"):
        Setting(settings_of(eps_high=0.5), objective=DAPO())


def test_metrics_with_the_names_of_training_s_own_are_refused():
    class Named(Focal):
        def __call__(self, now, then):
            return Terms(super().__call__(now, then).loss, {"load_balance": now.log_prob})

    check_objective(Named(), with_samples=False)
    with pytest.raises(UserError, match="metric 'load_balance' has the name of one that training writes"):
        fit(layer_of(), features_of(head_of()), head_of(), SFTConfig(), "test", objective=Named())


# --- in reinforcement learning, and the other seams --------------------------------------------------


class Reinforce(Objective):
    """The plain policy gradient, a ratio without a clip."""

    def __call__(self, now, then):
        return Terms(-(now.log_prob - then.log_prob).exp() * then.advantage, {"advantage": then.advantage})


class OfSequences(Objective):
    """GSPO's: one ratio an answer (arXiv 2507.18071)."""

    unit = "answer"

    def __call__(self, now, then):
        tokens_A = then.per_answer(torch.ones_like(now.log_prob))
        ratio_A = (then.per_answer(now.log_prob - then.log_prob) / tokens_A).exp()
        return Terms(-ratio_A * then.per_answer(then.advantage) / tokens_A)


@pytest.mark.parametrize("objective", [Reinforce(), OfSequences()])
def test_one_s_own_objective_raises_the_reward(objective):
    setting = Setting(settings_of(steps=9), objective=objective)
    setting.trainer.run()
    rewards = [line["reward"] for line in setting.lines if "reward" in line]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_the_usual_objective_given_is_the_one_of_the_settings():
    layers = []
    for objective in (None, DAPO()):
        setting = Setting(settings_of(steps=3), objective=objective)
        setting.trainer.run()
        layers.append(setting.layer.experts.detach())
    assert torch.equal(*layers)


def test_advantage_and_selection_of_one_s_own():
    seen = []

    def plain(reward_N, group):
        seen.append(group)
        advantage_N = reward_N - reward_N.mean()
        return advantage_N, torch.ones_like(reward_N, dtype=torch.bool)

    def first_tokens(candidates):
        return candidates.features.position == 0

    setting = Setting(settings_of(steps=2), changed=lambda one: replace(one, advantage=plain, selection=first_tokens))
    setting.trainer.run()
    assert seen == [4, 4]
    assert [line["selected"] for line in setting.lines[1:]] == [16, 16]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"advantage": lambda reward, group: (reward[:3], reward > 0)}, r"advantages of 16 samples have shape \(3,\)"),
        ({"advantage": lambda reward, group: (reward / 0 - 1, reward == reward)}, "an advantage is not finite"),
        ({"selection": lambda candidates: candidates.entropy}, "the selection of tokens gave torch.float32"),
    ],
)
def test_unusable_advantages_and_selections_are_refused(change, sentence):
    setting = Setting(settings_of(steps=1), changed=lambda one: replace(one, **change))
    with pytest.raises(UserError, match=sentence):
        setting.trainer.run()


class Stops:
    """Ends a run once so many steps are taken; remembers what it was told."""

    def __init__(self, after):
        self.after, self.steps, self.metrics = after, [], []

    def on_step(self, step, metrics, layer):
        self.steps.append(step)
        self.metrics.append(dict(metrics))
        return step == self.after


def test_a_callback_sees_every_step_and_may_end_the_run(tmp_path):
    head, layer, callback = head_of(), layer_of(), Stops(5)
    features = features_of(head)
    settings = run_settings(tmp_path, evaluate_every=4)
    report = train_in(layer, features, features, head, settings, callbacks=[callback])
    assert callback.steps == [0, 1, 2, 3, 4, 5]
    assert report.steps == 5
    assert callback.metrics == [{k: v for k, v in line.items() if k != "step"} for line in lines_of(tmp_path)]
    assert "held_out_nll" in callback.metrics[4]


def test_a_callback_changes_nothing_and_one_that_stops_is_heard_among_others():
    layers = []
    for callbacks in ((), (Stops(None), Stops(None))):
        layer = layer_of()
        features = features_of(head_of())
        settings = SFTConfig(epochs=1, batch_tokens=16)
        fit(layer, features, head_of(), settings, "test", Watching(callbacks=callbacks))
        layers.append(layer.experts.detach())
    assert torch.equal(*layers)
    setting = Setting(settings_of(steps=4), callbacks=[Stops(2), Stops(None)])
    assert setting.trainer.run().step == 2


# --- the page ----------------------------------------------------------------------------------------


def test_what_the_page_shows_runs():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "objectives.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown: dict = {"mb": moe_bias}
    for block in blocks:
        if "class " in block:
            exec(block, shown)
    layer, features, head = layer_of(), features_of(head_of()), head_of()
    settings = SFTConfig(epochs=40, batch_tokens=16, expert_rate=0.1, warmup=0.0)
    for name, steps in {"Focal": 160, "PerAnswer": 200}.items():  # 4 batches of 16 tokens, 5 of 2 answers
        assert fit(layer, features, head, settings, name, objective=shown[name]()).steps == steps
    report = fit(layer, features, head, settings, "stops", Watching(callbacks=[shown["Patient"]()]))
    assert 20 <= report.steps < 160
