"""What is read of a layer's effect at each token, from stored scalars against the whole vocabulary."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import HIDDEN, VOCABULARY, randomise, tiny_model
from moe_bias.analysis.readings import TokenReadings, read_features, read_tokens, top_tokens
from moe_bias.backbone import Head, adapted_logits, find_head
from moe_bias.chunks import AtOnce
from moe_bias.config import LayerConfig
from moe_bias.features import extract as extract_module
from moe_bias.features.extract import HiddenTokens, with_scalars
from moe_bias.layer import MoEBiasLayer, entropy_from_logits

TOKENS = 37
quick = settings(max_examples=40, deadline=None)


def head_of(name: str) -> Head:
    return find_head(tiny_model(name).double())[1]


def layer_of(support=None, scale=1.0, seed=1, **options) -> MoEBiasLayer:
    """A random layer in float64."""
    options = {"num_experts": 5, "top_k": 2, **options}
    layer = MoEBiasLayer(LayerConfig(experts="free", support=support, **options), HIDDEN, VOCABULARY)
    randomise(layer, seed, scale)
    return layer.double()


def text_of(seed: int = 0) -> HiddenTokens:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    token_T = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return HiddenTokens(hidden_TD, token_T, torch.zeros(TOKENS, dtype=torch.int64))


def both(layer: MoEBiasLayer, head: Head, text: HiddenTokens) -> tuple[TokenReadings, TokenReadings]:
    """From the support's columns and two scalars, and from the whole vocabulary."""
    ids = list(range(VOCABULARY)) if layer.support is None else layer.support.tolist()
    features = with_scalars(head, text, ids, "test")
    reduced = read_features(layer, head, features, head.columns(features.support))
    return reduced, read_tokens(layer, head, text.hidden, text.token)


def assert_same_readings(found: TokenReadings, expected: TokenReadings, tied_T: torch.Tensor | None = None) -> None:
    """Where the largest adapted logit is tied, either choice is right."""
    for field in fields(TokenReadings):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        elif field.name == "adapted_choice" and tied_T is not None:
            assert torch.equal(ours[~tied_T], theirs[~tied_T])
        else:
            assert torch.equal(ours, theirs), field.name


def ties(layer: MoEBiasLayer, head: Head, text: HiddenTokens) -> torch.Tensor:
    """(T,) bool: a soft-cap brings several tokens to its edge, and rounding tells them apart."""
    logits_TV = head.logits(text.hidden)
    adapted_TV = adapted_logits(layer, head.transform, text.hidden, entropy_from_logits(logits_TV), logits_TV)
    return -adapted_TV.topk(2).values.diff().squeeze(-1) < 1e-9


supports = st.sets(st.integers(0, VOCABULARY - 1), min_size=1).map(lambda ids: tuple(sorted(ids)))


@quick
@given(
    name=st.sampled_from(["llama", "gemma2", "cohere", "gpt_neox"]),
    support=st.none() | supports,
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    gate=st.booleans(),
    strength=st.sampled_from([0.0, 0.5, 1.0, -2.0]),
    seed=st.integers(0, 5),
)
def test_stored_scalars_give_what_the_whole_vocabulary_gives(name, support, scale, gate, strength, seed):
    layer = layer_of(support, scale, seed, entropy_gate=gate, strength=strength)
    head, text = head_of(name), text_of(seed)
    tied_T = ties(layer, head, text)
    assert name == "gemma2" or not tied_T.any()
    assert_same_readings(*both(layer, head, text), tied_T)


def test_hand_worked_values():
    """One expert without a gate: b is its row, so all that is read can be written out."""
    head, text = head_of("llama"), text_of()
    layer = layer_of((3, 50), num_experts=1, top_k=1, entropy_gate=False)
    with torch.no_grad():
        layer.experts.copy_(torch.tensor([[30.0, -10.0]]))
    readings = read_tokens(layer, head, text.hidden, text.token)
    base_TV = head.logits(text.hidden).log_softmax(-1)
    moved_TV = head.logits(text.hidden)
    moved_TV[:, 3] += 30
    moved_TV[:, 50] -= 10
    moved_TV = moved_TV.log_softmax(-1)
    assert torch.equal(readings.weight, torch.ones(TOKENS, dtype=torch.float64))
    assert readings.bias_mean.tolist() == [20.0] * TOKENS  # (30 + 10) / 2
    assert readings.bias_max.tolist() == [30.0] * TOKENS
    assert readings.experts.tolist() == [[0]] * TOKENS
    assert readings.gates.tolist() == [[1.0]] * TOKENS
    torch.testing.assert_close(readings.kl, (moved_TV.exp() * (moved_TV - base_TV)).sum(-1))
    torch.testing.assert_close(readings.base_entropy, -(base_TV.exp() * base_TV).sum(-1))
    torch.testing.assert_close(readings.adapted_entropy, -(moved_TV.exp() * moved_TV).sum(-1))
    torch.testing.assert_close(readings.base_log_prob, base_TV[torch.arange(TOKENS), text.token])
    torch.testing.assert_close(readings.adapted_log_prob, moved_TV[torch.arange(TOKENS), text.token])
    assert torch.equal(readings.base_choice, base_TV.argmax(-1))
    assert torch.equal(readings.adapted_choice, moved_TV.argmax(-1))
    assert torch.equal(readings.flipped, base_TV.argmax(-1) != moved_TV.argmax(-1))
    assert readings.flipped.any()


def test_a_layer_that_changes_nothing_reads_as_nothing():
    head, text = head_of("llama"), text_of()
    layer = layer_of((3, 50, 60))
    with torch.no_grad():
        layer.experts.zero_()
    for readings in both(layer, head, text):
        assert not readings.flipped.any()
        assert readings.bias_max.max() == 0
        torch.testing.assert_close(readings.kl, torch.zeros(TOKENS, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(readings.adapted_entropy, readings.base_entropy)
        torch.testing.assert_close(readings.adapted_log_prob, readings.base_log_prob)


def test_only_tokens_that_the_support_leaves_open_go_through_the_output_embedding(monkeypatch):
    head, text = head_of("llama"), text_of()
    text = replace(text, hidden=8 * text.hidden)
    logits_TV = head.logits(text.hidden)
    support_M = logits_TV.max(0).values.topk(70).indices.sort().values
    layer = layer_of(tuple(support_M.tolist()), scale=0.1)
    features = with_scalars(head, text, support_M.tolist(), "test")
    asked = []
    whole = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden: asked.append(len(hidden)) or whole(self, hidden))
    readings = read_features(layer, head, features, head.columns(support_M))
    certain = logits_TV[:, support_M].amax(-1) > features.rest.log_sum_exp
    assert 0 < sum(asked) < TOKENS
    assert TOKENS - sum(asked) <= int(certain.sum())
    assert torch.equal(readings.base_choice, logits_TV.argmax(-1))


def test_chunks_give_what_the_whole_gives(monkeypatch):
    head, layer, text = head_of("llama"), layer_of((3, 50, 60)), text_of()
    reduced, whole = both(layer, head, text)
    monkeypatch.setattr(extract_module, "LOGITS", AtOnce(5 * VOCABULARY, 5 * VOCABULARY))
    for found, expected in zip(both(layer, head, text), (reduced, whole), strict=True):
        assert_same_readings(found, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_top_tokens_hold_the_choices_and_the_realised_probability(name):
    head, layer, text = head_of(name), layer_of((3, 50, 60), 3.0), text_of()
    readings = read_tokens(layer, head, text.hidden, text.token)
    top = top_tokens(layer, head, text.hidden, VOCABULARY)
    assert torch.equal(top.base_ids[:, 0], readings.base_choice)
    assert torch.equal(top.adapted_ids[:, 0], readings.adapted_choice)
    for ids_TN, probs_TN, log_prob_T in (
        (top.base_ids, top.base_probs, readings.base_log_prob),
        (top.adapted_ids, top.adapted_probs, readings.adapted_log_prob),
    ):
        realised_T = probs_TN[ids_TN == text.token[:, None]]
        torch.testing.assert_close(realised_T.log(), log_prob_T)
        torch.testing.assert_close(probs_TN.sum(-1), torch.ones(TOKENS, dtype=torch.float64))
        assert (probs_TN.diff(dim=-1) <= 0).all()
    assert torch.equal(top_tokens(layer, head, text.hidden, 4).base_ids, top.base_ids[:, :4])


def test_entropies_of_features_are_those_of_the_base():
    """The gate reads the stored entropy, not one that is taken again."""
    head, layer, text = head_of("llama"), layer_of((3, 50, 60)), text_of()
    features = with_scalars(head, text, [3, 50, 60], "test")
    moved = replace(features, entropy=features.entropy + math.pi)
    readings = read_features(layer, head, moved, head.columns(features.support))
    torch.testing.assert_close(readings.weight, layer.gate_weight(features.entropy + math.pi))
