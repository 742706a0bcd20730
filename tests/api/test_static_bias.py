"""A layer made by hand: logits move by exactly its biases, and it is saved, loaded and answered with as any."""

import math
import re

import pytest
import torch
from peft import PeftModel

import moe_bias as mb
from helpers.models import ARCHITECTURES, VOCABULARY, tiny_model, token_ids, word_tokenizer
from moe_bias.backbone import adapted_logits, hidden_states
from moe_bias.layer import entropy_from_logits

BIASES = {"w5": -2.0, "w9": 1.5, 40: 0.25}
IDS = {5: -2.0, 9: 1.5, 40: 0.25}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_final_logits_move_by_exactly_the_biases(name):
    base, ids = mb.Frozen(tiny_model(name), word_tokenizer()), token_ids()
    layer = mb.static_bias(base, BIASES)
    logits = base.model(input_ids=ids).logits
    hidden = hidden_states(base.model, ids, torch.ones_like(ids))
    wanted = torch.zeros(VOCABULARY)
    wanted[list(IDS)] = torch.tensor(list(IDS.values()))
    moved = adapted_logits(layer, base.head.transform, hidden, entropy_from_logits(logits), logits)
    # A soft-cap bounds what final logits can be; elsewhere it is the bias itself.
    expected = base.head.transform.reachable(logits.float(), wanted.expand_as(logits))
    torch.testing.assert_close(moved - logits, expected, rtol=1e-5, atol=2e-6)
    if name != "gemma2":
        assert torch.equal(expected, wanted.expand_as(logits))
    assert [parameter.numel() for parameter in layer.parameters()] == [3]
    off = [token for token in range(VOCABULARY) if token not in IDS]
    assert torch.equal(moved[..., off], logits[..., off].float())


@torch.no_grad()
def test_it_is_saved_and_served_as_any(tmp_path):
    base, ids = mb.Frozen(tiny_model(), word_tokenizer()), token_ids()
    layer, logits = mb.static_bias(base, BIASES), base.model(input_ids=ids).logits
    mb.save(layer, tmp_path / "hand", base)
    loaded = mb.load_layer(tmp_path / "hand", base)
    assert torch.equal(loaded.experts, layer.experts)
    moved = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "hand")).eval()(input_ids=ids).logits
    for token, bias in IDS.items():
        torch.testing.assert_close(moved[..., token] - logits[..., token], torch.full(ids.shape, bias))
    merged = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "hand")).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, moved)
    banned = mb.static_bias(base, {mb.generate(base, "w5 w6", chat=False, max_new_tokens=1): -100.0})
    first = mb.generate(base, "w5 w6", chat=False, max_new_tokens=1)
    assert first not in mb.generate(base, "w5 w6", banned, chat=False, max_new_tokens=8).split()


def test_a_word_stands_for_itself_and_for_itself_after_a_space():
    base = mb.load("bundled")
    layer, tokenizer = mb.static_bias(base, {"Let": -2.0, ",": -1.0}), base.tokenizer
    found = dict(zip(layer.support_ids.tolist(), layer.experts[0].tolist(), strict=True))
    words = {tokenizer.decode([token]): bias for token, bias in found.items()}
    assert words == {"Let": -2.0, " Let": -2.0, ",": -1.0}


@pytest.mark.parametrize(
    ("biases", "sentence"),
    [
        ({}, "`biases` is a dict; give words and their biases, such as {'Wait': -4.0}"),
        ({"nonsense": -1.0}, "'nonsense' is no token of its own: the tokenizer makes"),
        ({97: -1.0}, "`biases` has token id 97; the vocabulary has those from 0 to 96"),
        ({"w5": math.inf}, "the bias of 'w5' is inf; give a finite number of logits, such as -2.0"),
        ({"w5": "-1"}, "the bias of 'w5' is '-1'; give a finite number"),
        ({"w5": -1.0, 5: 1.0}, "`biases` names token 5 ('w5') twice, by 5 too"),
        ({None: -1.0}, "`biases` has None; give words or token ids"),
    ],
)
def test_what_cannot_be_a_bias_is_told(biases, sentence):
    with pytest.raises(mb.UserError, match=re.escape(sentence)):
        mb.static_bias(mb.Frozen(tiny_model(), word_tokenizer()), biases)
