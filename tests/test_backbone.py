import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from helpers.models import ARCHITECTURES, HIDDEN, VOCABULARY, randomise, tiny_model, token_ids
from moe_bias import MoEBiasConfig, find_adapter_head
from moe_bias.backbone import (
    HeadTransform,
    captured_hidden,
    find_head,
    hidden_states,
)
from moe_bias.mistakes import UserError

quick = settings(max_examples=50, deadline=None)
CAPPED = HeadTransform(scale=0.5, cap=30.0)


@quick
@given(st.floats(-2000, 2000, width=32), st.floats(-100, 100, width=32))
def test_raw_move_moves_the_final_logit_by_what_is_reachable(raw, move):
    raw_1, move_1 = torch.tensor([raw]), torch.tensor([move])
    final_1 = CAPPED.apply(raw_1)
    moved_1 = CAPPED.apply(raw_1 + CAPPED.raw_move(raw_1, move_1))
    expected_1 = final_1 + CAPPED.reachable(final_1, move_1)
    # The sum of a raw logit and its move is rounded at their own magnitude, whatever the cap.
    torch.testing.assert_close(moved_1, expected_1, rtol=0, atol=2e-5 + abs(raw) * 2**-23)
    assert abs(float(moved_1)) <= 30


def test_saturated_logit_comes_down_by_the_move():
    # 1e4 * 0.5 / 30 is so far out that the final logit is the cap itself.
    raw_1 = torch.tensor([1e4])
    assert float(CAPPED.apply(raw_1)) == 30
    assert float(CAPPED.apply(raw_1 + CAPPED.raw_move(raw_1, torch.tensor([-1.0])))) == pytest.approx(29, abs=1e-5)


def test_saturated_logit_goes_no_further_and_never_back():
    final_1 = torch.tensor([30.0])
    assert float(CAPPED.reachable(final_1, torch.tensor([0.5]))) == 0
    assert float(CAPPED.raw_move(torch.tensor([1e4]), torch.tensor([0.5]))) == 0


@pytest.mark.parametrize("transform", [HeadTransform(), HeadTransform(scale=0.25), CAPPED])
def test_no_move_is_exactly_nothing(transform):
    raw_V = torch.cat([torch.randn(1000) * 100, torch.tensor([1e4, -1e4])])
    assert torch.equal(transform.raw_move(raw_V, torch.zeros(1002)), torch.zeros(1002))


@pytest.mark.parametrize("transform", [HeadTransform(), HeadTransform(scale=0.25), CAPPED])
def test_gradients_of_the_raw_move_are_finite(transform):
    raw_V = torch.tensor([0.0, 50.0, -150.0, 1e4, -1e4, 1e4])
    move_V = torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0, 1.0], requires_grad=True)
    (gradient_V,) = torch.autograd.grad(transform.raw_move(raw_V, move_V).sum(), move_V)
    assert gradient_V.isfinite().all()


def test_transform_by_hand():
    # 30 tanh(0.5 * 60 / 30) = 30 tanh(1).
    assert float(CAPPED.apply(torch.tensor(60.0))) == pytest.approx(30 * math.tanh(1))
    assert float(HeadTransform(scale=0.25).raw_move(torch.tensor(9.0), torch.tensor(1.0))) == 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_makes_the_models_own_logits_from_captured_hidden_states(name):
    model, ids = tiny_model(name), token_ids()
    hidden = hidden_states(model, ids, torch.ones_like(ids))
    assert hidden.shape == (2, 7, HIDDEN)
    _, head = find_head(model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-5, atol=1e-5)
    support_M = torch.tensor([5, 0, 96])
    torch.testing.assert_close(head.columns(support_M)(hidden), logits[..., support_M], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi"])
def test_logits_of_some_tokens_are_rounded_as_all_are(name, dtype):
    model = tiny_model(name).to(dtype)
    head = find_head(model)[1]
    hidden_TD = torch.randn(400, head.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    support_M, token_T = torch.arange(1, VOCABULARY, 3), torch.arange(400) % VOCABULARY
    logits_TV = head.logits(hidden_TD)
    expected = [logits_TV[:, support_M], logits_TV.gather(-1, token_T[:, None]).squeeze(-1)]
    for found, own in zip(
        [head.columns(support_M)(hidden_TD), head.token_logits(hidden_TD, token_T)], expected, strict=True
    ):
        assert (found == own).double().mean() > 0.98  # the others are on the edge between two numbers
        assert (found - own).abs().max() <= torch.finfo(dtype).eps * own.abs().max()


def test_capture_leaves_the_model_as_it_was():
    model, ids = tiny_model(), token_ids()
    with pytest.raises(RuntimeError, match="inside"), captured_hidden(model):
        raise RuntimeError("inside")
    assert model(input_ids=ids).logits.shape == (2, 7, VOCABULARY)


def test_capture_keeps_a_forward_that_another_library_set():
    model, ids = tiny_model(), token_ids()
    head = model.get_output_embeddings()
    own = head.forward
    head.forward = lambda hidden: own(hidden) + 1
    changed = model(input_ids=ids).logits
    hidden_states(model, ids, torch.ones_like(ids))
    assert torch.equal(model(input_ids=ids).logits, changed)


def test_finding_the_head_works_without_weights():
    with torch.device("meta"):
        model = tiny_model("granite")
    assert find_head(model)[1].transform.scale == pytest.approx(0.25)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 32, "num_attention_heads": 2}
TEXT = {
    **SIZES,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 2,
    "bos_token_id": 1,
}
LAYERS = {"d_model": HIDDEN, "vocab_size": VOCABULARY, "encoder_layers": 1, "decoder_layers": 1, "is_decoder": True}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
}
PROJECTED = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
ENCODER = {**SIZES, "num_hidden_layers": 2, "is_decoder": True}
UNUSUAL = {
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**TEXT, intermediate_size_mlp=32)),
    "llama4-images": lambda: transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(
            text_config={**TEXT, "intermediate_size_mlp": 32}, vision_config={**VISION, **PROJECTED, "patch_size": 14}
        )
    ),
    "electra": lambda: transformers.ElectraForCausalLM(transformers.ElectraConfig(**ENCODER, embedding_size=8)),
    "rembert": lambda: transformers.RemBertForCausalLM(
        transformers.RemBertConfig(**ENCODER, input_embedding_size=8, output_embedding_size=24)
    ),
    "bert": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**ENCODER)),
    "bart": lambda: transformers.BartForCausalLM(transformers.BartConfig(**LAYERS, **HEADS)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_models_whose_backbone_is_not_as_usual(name):
    torch.manual_seed(0)
    model, ids = UNUSUAL[name]().eval(), token_ids()
    head = find_head(model)[1]
    hidden = hidden_states(model, ids, torch.ones_like(ids))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-5, atol=1e-5)
    layer_head = find_adapter_head(adapted := get_peft_model(model, MoEBiasConfig(experts="free")))
    randomise(layer_head.active_layer)
    with torch.no_grad():
        assert not torch.equal(adapted(input_ids=ids).logits, logits)


@pytest.mark.parametrize("name", UNUSUAL)
def test_they_are_found_without_weights_too_or_refused_by_name(name):
    with torch.device("meta"):
        model = UNUSUAL[name]()
    if name == "bart":  # the forward reaches into its backbone, which then runs and has no numbers
        with pytest.raises(UserError, match="the forward of BartForCausalLM cannot be checked without its backbone"):
            find_head(model)
    else:
        assert find_head(model)[1].transform == HeadTransform()


def test_a_forward_that_cannot_be_checked_is_refused_by_name():
    config = transformers.ProphetNetConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_decoder_layers=1, is_decoder=True, is_encoder_decoder=False
    )
    sentence = r"the forward of ProphetNetForCausalLM cannot be .* \(its output embedding reads \(1, 2, 1, 16\) for one"
    with pytest.raises(UserError, match=sentence):
        find_head(transformers.ProphetNetForCausalLM(config))
