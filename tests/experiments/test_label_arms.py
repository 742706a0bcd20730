import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import tiny_model
from moe_bias.backbone import find_head
from moe_bias.experiments.label_arms import (
    ALONE,
    DEFAULT,
    LABELS,
    MOE_BIAS,
    STATIC,
    Labels,
    Texts,
    contextual,
    divided,
    drawn,
    folds_of,
    logistic,
    nll,
    trained,
    zero_shot_arms,
)
from moe_bias.experiments.label_probe import MASS, probe, refuse_without_probe
from moe_bias.features.extract import HiddenTokens, with_scalars
from moe_bias.mistakes import UserError
from moe_bias.support import reduced_log_prob

TOKEN = torch.tensor([40, 7, 21])


def test_contextual_calibration_is_the_papers_formula():
    # arXiv 2102.09690: W = diag(p_cf)^-1, b = 0, q = softmax(W p + b). p_cf = (0.8, 0.2), p = (0.6, 0.4):
    # W p = (0.75, 2), softmax = (e^0.75, e^2) / (e^0.75 + e^2) = (0.2227, 0.7773)
    found = contextual(torch.tensor([[0.6, 0.4]]), torch.tensor([0.8, 0.2]))
    assert found[0].tolist() == pytest.approx([0.22270, 0.77730], abs=1e-5)


def test_divided_it_keeps_probabilities_where_inputs_without_content_favour_no_label():
    prob, even = torch.tensor([[0.6, 0.4]]), torch.tensor([0.5, 0.5])
    assert divided(prob, even)[0].tolist() == pytest.approx([0.6, 0.4])
    # (0.75, 2) / 2.75
    assert divided(prob, torch.tensor([0.8, 0.2]))[0].tolist() == pytest.approx([3 / 11, 8 / 11])


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_both_choose_alike(prob, free):
    prob_NK, free_K = torch.tensor([prob]), torch.tensor(free)
    ratio_K = prob_NK[0] / free_K
    if ratio_K.topk(2).values.diff().abs() > 1e-4:
        chosen = int(ratio_K.argmax())
        assert int(contextual(prob_NK, free_K).argmax()) == int(divided(prob_NK, free_K).argmax()) == chosen


@given(st.lists(st.integers(0, 2), max_size=40).map(lambda labels: [*labels, *4 * [0, 1, 2]]))
def test_draws_are_nested_and_hold_every_label(labels):
    label_N = torch.tensor(labels)
    small, large = drawn(label_N, 6, 2, seed=3), drawn(label_N, 11, 2, seed=3)
    assert small.tolist() == large[:6].tolist()
    assert len(set(large.tolist())) == 11
    assert label_N[small].bincount(minlength=3).tolist() == [2, 2, 2]
    assert drawn(label_N, 11, 2, seed=4).tolist() != large.tolist()


@given(st.lists(st.integers(0, 2), max_size=40).map(lambda labels: [*labels, *2 * [2, 0, 1]]))
def test_whatever_fold_is_left_out_every_label_is_in_the_others(labels):
    label_N = torch.tensor(labels)
    fold_N = folds_of(label_N, 3)
    for fold in range(3):
        assert set(label_N[fold_N != fold].tolist()) == {0, 1, 2}
        counts = [int(((label_N == k) & (fold_N == fold)).sum()) for k in range(3)]
        whole = label_N.bincount(minlength=3).tolist()
        assert all(abs(one - all_ / 3) < 1 for one, all_ in zip(counts, whole, strict=True))


@pytest.fixture(scope="module")
def labels() -> Labels:
    return Labels(find_head(tiny_model("gemma2"))[1], TOKEN)


def texts(labels: Labels, count: int, seed: int) -> Texts:
    """Hidden states in clouds, a label each."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(count) % len(labels.token)
    hidden_ND = 2 * torch.eye(16)[label_N + 4] + 0.3 * torch.randn(count, 16, generator=generator)
    tokens = HiddenTokens(hidden_ND, labels.token[label_N], torch.arange(count))
    ids = (labels.token.tolist(), [3, 7, 9, 21, 40, 50])
    narrow, wide = (with_scalars(labels.head, tokens, support, "") for support in ids)
    made = Texts.of(narrow, wide, labels.token)
    assert made.label.tolist() == label_N.tolist()
    return made


def test_the_base_is_its_logits_on_the_labels_alone(labels):
    part = texts(labels, 5, 0)
    logits_NK = labels.head.logits(part.hidden)[:, TOKEN]
    assert torch.allclose(labels.base_log_probs(part), logits_NK.log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("arm", [STATIC, MOE_BIAS], ids=lambda arm: arm.name)
def test_a_layer_learns_the_labels_and_gives_what_the_whole_model_would(labels, arm, monkeypatch):
    monkeypatch.setattr("moe_bias.experiments.label_arms.MOST_STEPS", 30)
    train, test = texts(labels, 36, 1), texts(labels, 30, 2)
    found = trained(arm, labels, train, test, folds=3, seed=0)
    assert found.layer is not None
    assert found.choice is not None
    assert found.choice["steps"] in range(0, 31, 5)
    before = nll(labels.base_log_probs(test), test.label).mean()
    assert nll(found.log_prob, test.label).mean() < before
    features = test.on[found.choice["trained on"]]
    with torch.no_grad():
        whole = labels.head.logits(features.hidden)
        bias = found.layer.on_vocabulary(found.layer(features.hidden, features.entropy).bias)
        moved = whole + labels.head.transform.reachable(whole, bias)
    assert torch.allclose(found.log_prob, moved[:, TOKEN].log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize(("trained_on", "others"), [(ALONE, False), (LABELS, True), (DEFAULT, True)])
def test_alone_a_loss_is_of_the_labels_and_else_of_the_whole_vocabulary(labels, trained_on, others):
    part = texts(labels, 6, 0)
    features = part.on[trained_on]
    logits_NM = labels.head.columns(features.support)(features.hidden)
    still = torch.zeros_like(logits_NM)
    found = reduced_log_prob(features.logit, features.column, logits_NM, still, features.rest)
    whole = labels.head.logits(part.hidden).log_softmax(-1).gather(-1, features.token[:, None])[:, 0]
    among = -nll(labels.base_log_probs(part), part.label)
    assert torch.allclose(found, whole if others else among, atol=1e-5)


def test_what_is_chosen_follows_from_the_labelled_texts_alone(labels):
    train = texts(labels, 24, 1)
    one, other = (logistic(train, texts(labels, 30, seed), folds=3) for seed in (2, 3))
    assert one.choice == other.choice
    assert one.log_prob.shape == (30, 3)
    assert torch.allclose(one.log_prob.exp().sum(-1), torch.ones(30), atol=1e-5)
    assert one.parameters == 3 * 17


def test_ways_without_labels(labels):
    test, free = texts(labels, 9, 2), texts(labels, 3, 5)
    found = zero_shot_arms(labels, test, free)
    assert list(found) == ["zero-shot", "contextual", "divided"]
    free_K = labels.base_log_probs(free).exp().mean(0)
    expected = contextual(labels.base_log_probs(test).exp(), free_K)
    assert torch.allclose(found["contextual"].log_prob.exp(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere"])
@pytest.mark.parametrize("token", [TOKEN, TOKEN[:2]], ids=["three", "two"])
def test_the_probe_as_a_layer_answers_as_the_probe(name, token):
    labels = Labels(find_head(tiny_model(name))[1], token)
    train, test = texts(labels, 36, 1), texts(labels, 30, 2)
    found, regressed = probe(labels, train, test, folds=3), logistic(train, test, folds=3)
    assert found.choice == regressed.choice
    assert torch.allclose(found.log_prob, regressed.log_prob, atol=2e-4)
    features = train.on[LABELS]
    with torch.no_grad():
        bias = found.layer.on_vocabulary(found.layer(features.hidden, features.entropy).bias)
        log_prob_NV = (labels.head.logits(features.hidden) + bias).log_softmax(-1)
    mass_N = log_prob_NV[:, token].logsumexp(-1).exp()
    assert int((mass_N > MASS - 1e-4).sum()) == 34  # 95% of 36


def test_no_layer_is_the_probe_under_a_soft_cap(labels):
    with pytest.raises(UserError, match="the model bounds its logits by a soft-cap"):
        refuse_without_probe(labels.head)
