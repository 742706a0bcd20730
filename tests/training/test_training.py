import copy
import math
from dataclasses import replace

import pytest
import torch

from helpers.models import HIDDEN, VOCABULARY, randomise
from helpers.training import SUPPORT, features_of, head_of, layer_of
from moe_bias.chunks import AtOnce
from moe_bias.config import SFTConfig
from moe_bias.evaluation.likelihood import per_example, token_nll
from moe_bias.experiments.lora import HeadLoRA
from moe_bias.features import adapted as adapted_module
from moe_bias.features.adapted import Adapted, adapted_policy, chunks
from moe_bias.features.base_logits import BaseLogits
from moe_bias.mistakes import UserError
from moe_bias.support import full_log_prob, full_stats
from moe_bias.training.gradients import gradients, plain_loss
from moe_bias.training.objectives import Distribution, Supervised, Then
from moe_bias.training.sft import fit, parse_support


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("support", [SUPPORT, None])
def test_log_prob_from_features_is_that_of_the_full_softmax(name, support):
    head, layer = head_of(name), layer_of(support)
    randomise(layer)
    features = features_of(head, support=range(VOCABULARY) if support is None else support)
    adapted = adapted_policy(layer, features, head.columns(features.support)(features.hidden), head.transform)
    logits_TV = head.logits(features.hidden)
    bias_TV = layer.on_vocabulary(layer(features.hidden, features.entropy).bias)
    move_TV = head.transform.reachable(logits_TV, bias_TV)
    everything = torch.arange(VOCABULARY)
    expected = full_log_prob(logits_TV.double(), move_TV.double(), everything, features.token)
    torch.testing.assert_close(adapted.log_prob.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("elements", [1, 58 * 7, 10**9])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_gradients_by_chunks_are_those_of_autograd_over_the_whole_batch(monkeypatch, kl_weight, elements, name):
    head, layer = head_of(name), layer_of(load_balance_weight=0.3, strength=1.7)
    randomise(layer)
    features = features_of(head)
    logits_of = head.columns(features.support)
    logits_TM = logits_of(features.hidden)
    adapted = adapted_policy(layer, features, logits_TM, head.transform, with_stats=kl_weight > 0)
    whole = plain_loss(Supervised(kl_weight), adapted, Then(features), 0.3)
    whole.total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(elements, elements))
    by_chunks = gradients(
        layer, features, lambda rows: logits_of(features.hidden[rows]), head.transform, Supervised(kl_weight)
    )
    torch.testing.assert_close(by_chunks.total, whole.total.detach())
    for part in ("nll", "kl"):
        torch.testing.assert_close(by_chunks.metrics[part], whole.metrics[part].detach())
    assert (whole.metrics["kl"] > 0) == (kl_weight > 0)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("hidden_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_gradients_are_those_of_autograd_through_the_full_softmax(kl_weight, hidden_type):
    head, layer = head_of(), layer_of(load_balance_weight=0.0)
    randomise(layer)
    features = features_of(head)
    features = replace(features, hidden=features.hidden.to(hidden_type))
    logits_of = head.columns(features.support)
    gradients(
        layer,
        features,
        lambda rows: logits_of(features.hidden[rows]).to(hidden_type),
        head.transform,
        Supervised(kl_weight),
    )
    found = {name: parameter.grad.double() for name, parameter in layer.named_parameters()}
    exact = copy.deepcopy(layer).double()
    exact.zero_grad()
    move_TM = exact(features.hidden.double(), features.entropy.double()).bias
    logits_TV = head.logits(features.hidden.float()).double()
    kl = full_stats(logits_TV, move_TM, features.support).kl.mean()
    (kl_weight * kl - full_log_prob(logits_TV, move_TM, features.support, features.token).mean()).backward()
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_chunks_are_even_and_hold_every_token(monkeypatch):
    # 10 rows fit: 21 tokens need three chunks, of 7 each, not 10, 10 and 1.
    monkeypatch.setattr(adapted_module, "UPDATE", AtOnce(10 * 58, 10 * 58))
    experts_EM = torch.zeros(4, 58)
    assert chunks(21, experts_EM) == [slice(0, 7), slice(7, 14), slice(14, 21)]
    assert chunks(10, experts_EM) == [slice(0, 10)]
    assert len(chunks(0, experts_EM)) == 1
    for tokens in range(1, 60):
        held = [token for rows in chunks(tokens, experts_EM) for token in range(tokens)[rows]]
        assert held == list(range(tokens))
        assert all(rows.stop - rows.start <= 10 for rows in chunks(tokens, experts_EM))


def test_gradients_are_added_to_those_there_are():
    head, layer = head_of(), layer_of()
    randomise(layer)
    features = features_of(head)
    logits_of = head.columns(features.support)
    once = {}
    for times in (1, 2):
        gradients(layer, features, lambda rows: logits_of(features.hidden[rows]), head.transform, Supervised())
        for name, parameter in layer.named_parameters():
            once.setdefault(name, parameter.grad.clone())
            torch.testing.assert_close(parameter.grad, times * once[name], msg=name)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_base_logits_are_the_same_after_a_step_overwrote_what_they_gave(budget):
    head, layer = head_of(), layer_of()
    randomise(layer)
    features, index = features_of(head), torch.arange(60, -1, -2)
    logits, batch = BaseLogits(features, head, budget), features.at(index)
    expected = head.logits(batch.hidden)[:, features.support]
    for _ in range(2):
        torch.testing.assert_close(logits.of(index, batch)(slice(3, 20)), expected[3:20])
        gradients(layer, batch, logits.of(index, batch), head.transform, Supervised())


def test_supervised_loss_by_hand():
    # Two tokens of log-probability -1 and -3: mean NLL 2. Uniform routing over 2 experts: balance 1.
    routing = layer_of(num_experts=2, top_k=1).route(torch.zeros(2, HIDDEN))
    routing.gates.copy_(torch.eye(2))
    stats = Distribution(torch.zeros(2), torch.tensor([0.5, 1.5]))
    features = features_of(head_of(), tokens=2)
    loss = plain_loss(Supervised(0.1), Adapted(torch.tensor([-1.0, -3.0]), routing, stats), Then(features), 0.5)
    assert (float(loss.load_balance), float(loss.total)) == (1.0, pytest.approx(2.6))
    assert {name: float(value) for name, value in loss.metrics.items()} == {"nll": 2.0, "kl": 1.0}


def test_fit_learns_what_the_hidden_state_tells_and_a_static_bias_cannot():
    head = head_of()
    features = features_of(head, tokens=400)
    settings = SFTConfig(epochs=60, batch_tokens=64, expert_rate=0.2, router_rate=0.02)
    nll = {}
    for name, choices in {"static": {"num_experts": 1, "top_k": 1, "entropy_gate": False}, "moe": {}}.items():
        layer = layer_of(**choices)
        fit(layer, features, head, settings, "test")
        nll[name] = float(token_nll(layer, features, head).mean())
    base = float(token_nll(None, features, head).mean())
    assert nll["static"] < base - 0.5
    assert nll["moe"] < nll["static"] - 0.2


def test_fit_gives_the_same_bytes_again():
    head = head_of()
    features = features_of(head)
    runs = []
    for _ in range(2):
        layer = layer_of()
        fit(layer, features, head, SFTConfig(epochs=2, batch_tokens=16), "test")
        runs.append(layer.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_hidden_states_that_are_not_finite_are_refused():
    head, layer = head_of(), layer_of()
    features = features_of(head)
    features.hidden[3, 0] = math.nan
    with pytest.raises(UserError, match="the hidden states hold NaN or infinite values"):
        fit(layer, features, head, SFTConfig(epochs=1), "test")


def test_nll_per_example_sums_its_tokens():
    head = head_of()
    features = features_of(head, tokens=15)
    nll_T = token_nll(None, features, head)
    sums = per_example(nll_T, features)
    assert sums.shape == (3,)
    assert sums[2] == pytest.approx(float(nll_T[14]))
    assert sums.sum() == pytest.approx(float(nll_T.sum()), rel=1e-6)


def test_parse_support(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text("[5, 3]")
    assert parse_support("auto:12", 97) == 12
    assert parse_support("all", 97) == list(range(97))
    assert parse_support(str(file), 97) == [5, 3]


@pytest.mark.parametrize("text", ["auto:0", "auto:98", "auto:x", "4096", "missing.json"])
def test_unusable_supports_are_refused(text):
    with pytest.raises(UserError, match="is none of 'auto:M' with M from 1 to 97, 'all', or a JSON file"):
        parse_support(text, 97)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[1, 97]", "support id 97 is outside the vocabulary of 97 tokens"),
        ("[1, 1]", "support id 1 stands more than once"),
        ("[]", "support is empty"),
        ('{"a": 1}', "must hold one list of token ids"),
        ("[1.5]", "must hold one list of token ids"),
        ("[1", "is not JSON"),
    ],
)
def test_unusable_support_files_are_refused(tmp_path, content, sentence):
    file = tmp_path / "ids.json"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        parse_support(str(file), 97)


@pytest.mark.parametrize("support", [tuple(SUPPORT), None])
@torch.no_grad()
def test_lora_on_the_output_embedding_is_its_formula(support):
    head = head_of()
    layer = HeadLoRA(head, 3, support)
    randomise(layer)
    hidden_TD = torch.randn(5, HIDDEN)
    # alpha / r = 2; B (M, r) times A (r, D) times h, whatever normalisation the layer holds.
    expected_TM = 2 * hidden_TD @ layer.router.weight.T @ layer.experts
    torch.testing.assert_close(layer(hidden_TD, torch.rand(5)).bias, expected_TM)


def test_lora_on_the_output_embedding_learns_from_stored_hidden_states():
    head, features = head_of(), features_of(head_of())
    layer = HeadLoRA(head, 2, tuple(SUPPORT))
    before = token_nll(None, features, head).mean()
    fit(layer, features, head, SFTConfig(epochs=60, expert_rate=0.1, router_rate=0.1), "test")
    assert token_nll(layer, features, head).mean() < before - 0.5


def test_training_on_the_first_tokens_leaves_the_others_alone():
    head, features = head_of(), features_of(head_of())
    spoilt = replace(features, hidden=torch.cat([features.hidden[:20], features.hidden[20:] * torch.nan]))
    layers = [layer_of(), layer_of()]
    for layer, source in zip(layers, (features.at(slice(20)), spoilt), strict=True):
        fit(layer, source, head, SFTConfig(epochs=2, batch_tokens=8, train_tokens=20), "test")
    for name, value in layers[0].state_dict().items():
        assert torch.equal(value, layers[1].state_dict()[name]), name
