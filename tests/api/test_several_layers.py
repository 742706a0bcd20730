"""Answers under several layers at once."""

import pytest
import torch

import moe_bias as mb
from helpers.models import randomise, tiny_model, word_tokenizer
from moe_bias.backbone import hidden_states
from moe_bias.config import LayerConfig
from moe_bias.layer import entropy_from_logits

TOKENS = 6


@pytest.fixture(scope="module")
def base():
    return mb.Frozen(tiny_model(), word_tokenizer())


def layer_of(base, seed, **options):
    torch.manual_seed(seed)
    layer = base.head.layer(LayerConfig(num_experts=3, **options)).requires_grad_(False)
    randomise(layer, seed, scale=3.0)
    return layer


@pytest.fixture(scope="module")
def layers(base):
    return layer_of(base, 1, experts="free", support=tuple(range(3, 90))), layer_of(base, 2, experts="directions")


def answer(base, layer):
    return mb.generate(base, "w5 w6", layer, chat=False, max_new_tokens=TOKENS)


@torch.no_grad()
def expected(base, parts):
    """Token by token, by the sum of what each layer adds; in float64 from the logits on."""
    ids = base.tokenizer("w5 w6").input_ids
    prompt = len(ids)
    for _ in range(TOKENS):
        given = torch.tensor([ids])
        hidden = hidden_states(base.model, given, torch.ones_like(given))[0, -1:]
        logits = base.model(input_ids=given).logits[0, -1:].double()
        entropy = entropy_from_logits(logits)
        for layer, strength in parts:
            logits = logits + strength * layer.on_vocabulary(layer(hidden, entropy).bias).double()
        ids.append(int(logits.argmax()))
    return base.tokenizer.decode(ids[prompt:], skip_special_tokens=True)


def test_a_mapping_has_the_strengths(base, layers):
    found = set()
    for one, other in ((1.0, 1.0), (0.7, -0.4), (0.0, 1.5), (0.0, 0.0)):
        given = dict(zip(layers, (one, other), strict=True))
        assert answer(base, given) == expected(base, given.items())
        found.add(answer(base, given))
    assert len(found) == 4
    assert answer(base, {layers[0]: 0.0}) == answer(base, None)


def test_a_list_has_each_at_its_own_strength(base, layers):
    for layer, strength in zip(layers, (0.5, 2.0), strict=True):
        layer.strength = strength
    try:
        assert answer(base, list(layers)) == answer(base, dict(zip(layers, (0.5, 2.0), strict=True)))
        assert answer(base, [layers[0]]) == answer(base, layers[0])
        assert answer(base, list(layers)) != answer(base, layers[0])
    finally:
        for layer in layers:
            layer.strength = 1.0
