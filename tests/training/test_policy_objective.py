"""The RL objective: numbers by hand, TRL's own loss, the plain reference, the full softmax."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.objectives import gradients_of, problem, rows_of
from moe_bias.backbone import HeadTransform
from moe_bias.chunks import AtOnce
from moe_bias.features import adapted as adapted_module
from moe_bias.features.adapted import Adapted, adapted_policy, mean_kl_to_base, policy_stats
from moe_bias.layer import Routing, itself, load_balance_loss
from moe_bias.mistakes import UserError
from moe_bias.support import full_log_prob, full_stats
from moe_bias.training.advantage import group_advantages, select_high_entropy
from moe_bias.training.gradients import gradients, plain_loss
from moe_bias.training.objectives import DAPO, Distribution, Sampled, Then, clipped_policy_loss

ALL_TERMS = DAPO(kl_weight=0.3, entropy_weight=0.05)


# --- advantages -----------------------------------------------------------------------------------


def test_advantages_by_hand():
    # Rewards 1 0 0 0: mean 1/4, squares 9/16 + 3 * 1/16 = 12/16, over 3: 1/4, std 1/2.
    # Advantages (1 - 1/4) / (1/2) = 3/2 and (0 - 1/4) / (1/2) = -1/2. The other groups are all equal.
    advantage, kept = group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]), 4)
    assert advantage.tolist() == [1.5, -0.5, -0.5, -0.5, *[0.0] * 8]
    assert kept.tolist() == [True] * 4 + [False] * 8


def test_equal_rewards_that_no_float_holds_are_equal():
    advantage, kept = group_advantages(torch.full((3,), 0.1, dtype=torch.float64), 3)
    assert not kept.any()
    assert (advantage == 0).all()


@given(st.lists(st.integers(-3, 3), min_size=6, max_size=6), st.floats(0.1, 10), st.floats(-5, 5))
def test_advantages_do_not_depend_on_the_rewards_scale_and_zero(rewards, scale, zero):
    reward_N = torch.tensor(rewards, dtype=torch.float64)
    advantage, kept = group_advantages(reward_N, 3)
    torch.testing.assert_close(group_advantages(reward_N * scale, 3)[0], advantage)
    if kept.all():
        torch.testing.assert_close(group_advantages(reward_N + zero, 3)[0], advantage)


@pytest.mark.parametrize(
    ("rewards", "group", "message"),
    [
        ([1.0, 0, 1], 2, "3 samples do not fill groups of 2"),
        ([1.0, 0], 1, "groups of 1; a group has 2 samples or more"),
        ([1.0, math.nan], 2, "reward nan is not finite"),
    ],
)
def test_unusable_rewards_are_refused(rewards, group, message):
    with pytest.raises(UserError, match=message):
        group_advantages(torch.tensor(rewards), group)


# --- token selection ------------------------------------------------------------------------------


def test_selection_by_hand():
    # Five tokens, share 0.4: the two highest, 5 and 4, so tau = 4.
    selected, threshold = select_high_entropy(torch.tensor([1.0, 5, 2, 4, 3]), 0.4)
    assert threshold == 4
    assert selected.tolist() == [False, True, False, True, False]


def test_selection_takes_all_ties_and_the_valid_tokens_alone():
    # Valid are 3 1 3 3: share 0.25 is one token, tau = 3, and three tokens tie. The 9s do not count.
    entropy = torch.tensor([9.0, 3, 1, 3, 9, 3])
    selected, threshold = select_high_entropy(entropy, 0.25, torch.tensor([0, 1, 1, 1, 0, 1]))
    assert threshold == 3
    assert selected.tolist() == [False, True, False, True, False, True]


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_selection_among_equal_entropies_is_all_of_them(share):
    selected, threshold = select_high_entropy(torch.full((7,), 0.1), share)
    assert selected.all()
    assert threshold == pytest.approx(0.1)


def test_selection_without_a_valid_token_is_empty():
    selected, threshold = select_high_entropy(torch.ones(3), 0.2, torch.zeros(3, dtype=torch.bool))
    assert not selected.any()
    assert threshold == math.inf
    assert select_high_entropy(torch.ones(0), 0.2)[0].shape == (0,)


@given(st.lists(st.floats(0, 11, width=32), min_size=1, max_size=40), st.floats(0.01, 1))
def test_at_least_the_share_is_selected_and_no_token_above_one_that_is_not(entropies, share):
    entropy = torch.tensor(entropies)
    selected, _ = select_high_entropy(entropy, share)
    assert selected.sum() >= share * len(entropy) - 1e-5
    if not selected.all():
        assert entropy[selected].min() > entropy[~selected].max()


def test_unusable_selections_are_refused():
    with pytest.raises(UserError, match=r"`rho` is 1\.5"):
        select_high_entropy(torch.ones(3), 1.5)
    with pytest.raises(UserError, match="the entropies hold NaN"):
        select_high_entropy(torch.tensor([1.0, math.nan, 2]), 0.7)


# --- the clipped loss -----------------------------------------------------------------------------

RATIOS = [1.0, 1.5, 0.5, 1.5, 0.5]
ADVANTAGES = [2.0, 2.0, 2.0, -1.0, -1.0]
# -min(r A, clip(r, 0.8, 1.28) A):
#   1.0, A 2:  min(2, 2) = 2;  1.5, A 2: min(3, 2.56) = 2.56, clipped;  0.5, A 2: min(1, 1.6) = 1
#   1.5, A -1: min(-1.5, -1.28) = -1.5;  0.5, A -1: min(-0.5, -0.8) = -0.8, clipped
LOSSES = [-2.0, -2.56, -1.0, 1.5, 0.8]
CLIPPED = [False, True, False, False, True]


def test_clipped_loss_by_hand():
    log_prob = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    loss, clipped = clipped_policy_loss(log_prob, torch.zeros(5), torch.tensor(ADVANTAGES))
    assert loss.tolist() == pytest.approx(LOSSES)
    assert clipped.tolist() == CLIPPED
    loss.sum().backward()
    # The gradient in log pi' is -r A where the ratio is not clipped, and 0 where it is.
    assert log_prob.grad.tolist() == pytest.approx([-2.0, 0, -1.0, 1.5, 0])


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-3, 3)), min_size=1, max_size=9),
    st.floats(0, 0.9),
    st.floats(0, 2),
)
def test_clipped_loss_is_the_minimum_of_the_paper(tokens, eps_low, eps_high):
    log_ratio, advantage = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    ratio = log_ratio.exp()
    expected = -torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)
    loss, _ = clipped_policy_loss(log_ratio, torch.zeros_like(ratio), advantage, eps_low, eps_high)
    torch.testing.assert_close(loss, expected)


def test_a_ratio_that_overflows_has_no_gradient_where_it_is_clipped():
    log_prob = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, clipped = clipped_policy_loss(log_prob, torch.tensor([-200.0, -200]), torch.tensor([1.0, 0]))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.28, 0])
    assert clipped.tolist() == [True, False]
    assert log_prob.grad.tolist() == [0, 0]


def uniform_routing(tokens):
    """Two experts of equal probability, tokens routed to them in turn: the load-balance loss is 1."""
    return Routing(torch.full((tokens, 2), 0.5), torch.eye(2).repeat(tokens, 1)[:tokens])


def test_policy_loss_by_hand():
    # Selected are the first, second and fifth: (-2 - 2.56 + 0.8) / 3 tokens = -3.76 / 3, two of three clipped.
    # KL (0.1 + 0.2 + 0.6) / 3 = 0.3 at weight 0.5; entropy (1 + 2 + 3) / 3 = 2 at weight 0.1.
    # Routed among them: experts 0, 1, 0, so f = (2/3, 1/3), P = (1/2, 1/2): 2 (1/3 + 1/6) = 1 at weight 0.01.
    stats = Distribution(torch.tensor([1.0, 2, math.nan, 9, 3]), torch.tensor([0.1, 0.2, math.nan, 9, 0.6]))
    adapted = Adapted(torch.tensor(RATIOS).log(), uniform_routing(5), stats)
    sampled = Sampled(torch.tensor([0, 0, math.nan, 0, 0]), torch.tensor(ADVANTAGES))
    selected = torch.tensor([True, True, False, False, True])
    then = Then(problem(tokens=5).features, sampled)
    loss = plain_loss(DAPO(kl_weight=0.5, entropy_weight=0.1), adapted, then, 0.01, selected)
    assert float(loss.metrics["clipped"]) == pytest.approx(2 / 3)
    assert float(loss.load_balance) == pytest.approx(1)
    assert float(loss.total) == pytest.approx(-3.76 / 3 + 0.5 * 0.3 - 0.1 * 2 + 0.01)
    assert int(loss.units) == 3


def test_policy_loss_without_a_selected_token_is_0():
    log_prob = torch.tensor([-1.0, math.nan], requires_grad=True)
    sampled = Sampled(torch.zeros(2), torch.ones(2))
    nothing = torch.zeros(2, dtype=torch.bool)
    then = Then(problem(tokens=2).features, sampled)
    loss = plain_loss(DAPO(), Adapted(log_prob, uniform_routing(2)), then, 0.01, nothing)
    loss.total.backward()
    assert loss.total.item() == 0
    assert log_prob.grad.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"eps_low": 1.0}, r"the clip range 1 - 1\.0 to 1 \+ 0\.28"),
        ({"eps_high": -0.1}, r"the clip range 1 - 0\.2 to 1 \+ -0\.1"),
        ({"kl_weight": -1}, "`kl_weight` = -1: it must be finite and at least 0"),
        ({"entropy_weight": math.inf}, "`entropy_weight` = inf: it must be a finite number"),
    ],
)
def test_unusable_terms_are_refused(choices, message):
    with pytest.raises(UserError, match=message):
        DAPO(**choices)


# --- against TRL ----------------------------------------------------------------------------------

LENGTHS = torch.tensor([5, 2, 7, 1])
"""Of four completions, padded to 7: 15 valid tokens."""
MASK_NL = (torch.arange(7) < LENGTHS[:, None]).long()


def trl_loss(log_prob_NL, old_NL, advantage_N, entropy_NL, loss_type="dapo", top_entropy_quantile=1.0):
    """TRL's own `_compute_loss`, in a trainer that holds nothing but what that method reads."""
    from collections import defaultdict

    from accelerate import Accelerator
    from trl import GRPOTrainer

    trainer = object.__new__(GRPOTrainer)
    vars(trainer).update(
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.28,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=loss_type,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=top_entropy_quantile,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_prob_NL, entropy_NL, None),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(MASK_NL),
        "completion_mask": MASK_NL,
        "advantages": advantage_N,
        "old_per_token_logps": old_NL,
        "num_items_in_batch": MASK_NL.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, trainer._metrics["train"]["clip_ratio/region_mean"][0]


def two_log_probs(scale=0.3):
    generator = torch.Generator().manual_seed(0)
    old_NL = -3 * torch.rand(4, 7, generator=generator, dtype=torch.float64)
    log_prob_NL = old_NL + scale * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    entropy_NL = 4 * torch.rand(4, 7, generator=generator, dtype=torch.float64)
    return log_prob_NL.requires_grad_(), old_NL, entropy_NL


def our_loss(log_prob_NL, old_NL, advantage_N, selected_NL):
    sampled = Sampled(old_NL.flatten(), advantage_N[:, None].expand(-1, 7).flatten())
    adapted = Adapted(log_prob_NL.flatten(), uniform_routing(28))
    return plain_loss(DAPO(), adapted, Then(problem(tokens=28).features, sampled), 0.0, selected_NL.flatten())


ADVANTAGE_N = torch.tensor([1.5, -0.5, 0.7, -1.2], dtype=torch.float64)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_loss_and_gradient_over_all_tokens_are_those_of_trl(loss_type):
    log_prob, old, entropy = two_log_probs()
    theirs, their_clipped = trl_loss(log_prob, old, ADVANTAGE_N, entropy, loss_type)
    (expected,) = torch.autograd.grad(theirs, log_prob)
    ours = our_loss(log_prob, old, ADVANTAGE_N, MASK_NL.bool())
    (gradient,) = torch.autograd.grad(ours.total, log_prob)
    torch.testing.assert_close(ours.total, theirs)
    torch.testing.assert_close(gradient, expected)
    assert ours.metrics["clipped"].item() == pytest.approx(their_clipped)
    assert 0 < their_clipped < 1
    assert (gradient[MASK_NL == 0] == 0).all()


def test_trl_divides_the_loss_of_the_selected_tokens_by_the_number_of_all():
    # 15 valid tokens, share 0.2: 3 of them here. TRL takes the 0.8 quantile by interpolation: between the
    # 12th and the 13th (place 0.8 * 14 = 11.2, counted from 0), which selects the same 3.
    log_prob, old, entropy = two_log_probs()
    theirs, _ = trl_loss(log_prob, old, ADVANTAGE_N, entropy, top_entropy_quantile=0.2)
    selected, _ = select_high_entropy(entropy, 0.2, MASK_NL)
    ours = our_loss(log_prob, old, ADVANTAGE_N, selected)
    assert int(ours.units) == 3
    torch.testing.assert_close(theirs, ours.total * 3 / 15)
    (expected,) = torch.autograd.grad(theirs, log_prob)
    (gradient,) = torch.autograd.grad(ours.total, log_prob)
    torch.testing.assert_close(gradient * 3 / 15, expected)


def test_trl_may_select_less_than_the_share():
    # Six tokens, share 0.4: 2.4 tokens, which we round up to 3. TRL's threshold is at place 0.6 * 5 = 3: the
    # fourth lowest, so 3 as well. Share 0.3: 1.8, so 2; place 0.7 * 5 = 3.5, between the 4th and 5th: 2.
    # Share 0.25: 1.5, so 2; place 3.75: 2. Share 0.19: 1.14, so 2; place 4.05, above the 5th: 1.
    entropy = torch.arange(6.0)
    counts = {share: int(select_high_entropy(entropy, share)[0].sum()) for share in (0.4, 0.3, 0.25, 0.19)}
    theirs = {share: int((entropy >= torch.quantile(entropy, 1 - share)).sum()) for share in counts}
    assert counts == {0.4: 3, 0.3: 2, 0.25: 2, 0.19: 2}
    assert theirs == {0.4: 3, 0.3: 2, 0.25: 2, 0.19: 1}


def test_advantages_are_those_of_trl_but_for_its_1e_4():
    from trl.trainer.utils import nanstd

    reward_PG = torch.tensor([[1.0, 0, 0, 1], [0.2, 0.9, 0.4, 0.1]], dtype=torch.float64)
    expected = (reward_PG - reward_PG.mean(-1, keepdim=True)) / nanstd(reward_PG, dim=1)[:, None]
    torch.testing.assert_close(group_advantages(reward_PG.flatten(), 4)[0], expected.flatten())


# --- on features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("terms", [DAPO(), ALL_TERMS], ids=["policy", "all"])
def test_loss_and_gradient_are_those_of_the_full_softmax_at_temperature(name, terms):
    p = problem(name, load_balance_weight=0.2)
    support_M, transform = p.features.support, p.head.transform
    final_TM = p.logits[:, support_M] * 0.7
    output = p.layer(p.features.hidden, p.features.entropy)
    move_TM = transform.reachable(final_TM, p.layer.strength * output.bias) / 0.7
    log_prob_T = full_log_prob(p.logits, move_TM, support_M, p.features.token)
    stats = full_stats(p.logits, move_TM, support_M)
    ratio_T, advantage_T = (log_prob_T - p.sampled.log_prob).exp(), p.sampled.advantage
    surrogate_T = torch.minimum(ratio_T * advantage_T, ratio_T.clamp(0.8, 1.28) * advantage_T)
    balance = load_balance_loss(output.routing)
    penalty = terms.kl_weight * stats.kl.mean() - terms.entropy_weight * stats.entropy.mean()
    expected = -surrogate_T.mean() + penalty + 0.2 * balance
    expected.backward()
    wanted = gradients_of(p.layer)
    p.layer.zero_grad()
    loss = gradients(p.layer, p.features, lambda rows: p.logits[rows][:, support_M], transform, terms, p.sampled, 0.7)
    torch.testing.assert_close(loss.total, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.log_prob, log_prob_T.detach(), rtol=1e-9, atol=1e-9)
    for key, gradient in gradients_of(p.layer).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("elements", [1, 58 * 7, 10**9])
@pytest.mark.parametrize("terms", [DAPO(), ALL_TERMS], ids=["policy", "all"])
def test_gradients_by_chunks_of_the_selected_tokens_are_those_of_the_plain_loss(monkeypatch, elements, terms):
    p = problem(load_balance_weight=0.2)
    logits_TM = p.logits[:, p.features.support]
    selected, _ = select_high_entropy(p.features.entropy, 0.4)
    adapted = adapted_policy(p.layer, p.features, logits_TM, p.head.transform, 0.7, terms.needs_stats)
    whole = plain_loss(terms, adapted, Then(p.features, p.sampled), 0.2, selected)
    whole.total.backward()
    expected = gradients_of(p.layer)
    p.layer.zero_grad()
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(elements, elements))
    index = selected.nonzero().squeeze(-1)
    loss = gradients(
        p.layer,
        p.features.at(index),
        lambda rows: logits_TM[index[rows]],
        p.head.transform,
        terms,
        p.sampled.at(index),
        0.7,
    )
    for part in ("total", "load_balance"):
        torch.testing.assert_close(getattr(loss, part), getattr(whole, part).detach(), msg=part)
    torch.testing.assert_close(loss.metrics, whole.metrics)
    assert float(loss.units) == float(whole.units) == 25
    torch.testing.assert_close(loss.log_prob, whole.log_prob.detach()[selected])
    for key, gradient in gradients_of(p.layer).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


def test_gradients_of_processes_sum_to_those_of_the_whole_batch():
    """Two threads play the processes: `total` waits for both and gives each the sum."""
    p = problem(load_balance_weight=0.2)
    logits_TM, barrier, given = p.logits[:, p.features.support], threading.Barrier(2, timeout=60), {}

    def run(rows, total=itself):
        layer = copy.deepcopy(p.layer)
        batch, sampled = p.features.at(rows), p.sampled.at(rows)
        loss = gradients(layer, batch, rows_of(logits_TM[rows]), p.head.transform, ALL_TERMS, sampled, 0.7, total)
        return loss, gradients_of(layer)

    def total_in(rank):
        def total(tensor):
            given[rank] = tensor
            barrier.wait()
            result = given[0] + given[1]
            barrier.wait()
            return result

        return total

    whole, expected = run(slice(None))
    with ThreadPoolExecutor(2) as threads:
        rows, totals = (slice(0, 20), slice(20, None)), (total_in(0), total_in(1))
        (first, one), (second, other) = threads.map(run, rows, totals)
    for loss in (first, second):
        torch.testing.assert_close(loss.total, whole.total)
        torch.testing.assert_close(loss.metrics, whole.metrics)
    for key, gradient in expected.items():
        torch.testing.assert_close(one[key] + other[key], gradient, msg=key)


@pytest.mark.parametrize("terms", [DAPO(), ALL_TERMS], ids=["policy", "all"])
def test_no_tokens_give_no_loss_and_no_gradient(terms):
    p = problem()
    nothing = slice(0, 0)
    loss = gradients(
        p.layer,
        p.features.at(nothing),
        lambda rows: torch.zeros(0, 58, dtype=torch.float64),
        p.head.transform,
        terms,
        p.sampled.at(nothing),
    )
    assert float(loss.total) == 0
    assert all((gradient == 0).all() for gradient in gradients_of(p.layer).values())
    kl = mean_kl_to_base(p.layer, p.features.at(nothing), lambda rows: p.logits[nothing, :58], p.head.transform)
    assert kl == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_entropy_and_kl_to_the_base_are_those_of_the_full_softmax(monkeypatch, name):
    p = problem(name)
    support_M = p.features.support
    final_TM = 0.7 * p.logits[:, support_M]
    with torch.no_grad():
        bias_TM = p.layer.strength * p.layer(p.features.hidden, p.features.entropy).bias
    expected = full_stats(p.logits, p.head.transform.reachable(final_TM, bias_TM) / 0.7, support_M)
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(58 * 7, 58 * 7))
    arguments = (p.layer, p.features, lambda rows: p.logits[rows][:, support_M], p.head.transform, 0.7)
    torch.testing.assert_close(policy_stats(*arguments).entropy, expected.entropy)
    torch.testing.assert_close(policy_stats(*arguments).kl, expected.kl)
    assert mean_kl_to_base(*arguments) == pytest.approx(float(expected.kl.mean()))
    assert mean_kl_to_base(*arguments) > 0.1


def test_a_fresh_layer_samples_what_it_is_trained_on():
    """At step 0 the ratio is 1: nothing is clipped, and the policy is the base."""
    p = problem()
    p.layer.experts.data.zero_()
    logits_TM = p.logits[:, p.features.support]
    base_T = full_log_prob(p.logits, torch.zeros_like(logits_TM), p.features.support, p.features.token)
    sampled = replace(p.sampled, log_prob=base_T)
    p.layer.config = p.layer.config.model_copy(update={"load_balance_weight": 0.0})
    loss = gradients(p.layer, p.features, rows_of(logits_TM), HeadTransform(), DAPO(), sampled, 0.7)
    torch.testing.assert_close(loss.total, -sampled.advantage.mean())
    assert float(loss.metrics["clipped"]) == 0
    assert p.layer.experts.grad.abs().max() > 0
