"""What TRL reads of an adapted model, against the model's own logits over the whole vocabulary, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from helpers.models import VOCABULARY, randomise, tiny_model
from moe_bias import MoEBiasConfig, find_adapter_head

pytest.importorskip("trl")
from moe_bias.backbone import Head
from moe_bias.trl import scores as scores_module
from moe_bias.trl.forward import IGNORED, AdaptedForward
from moe_bias.trl.states import RowStates

MEMORY = 2**30
SUPPORT = [2, 3, 11, 40, 41, 96]
FIELDS = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")


def adapted(architecture="llama", temperature=1.0, memory=MEMORY, entropy_has_gradient=True, **choices):
    """A tiny model under a random adapter in float64, whose forward is ours; and what it keeps of rows."""
    model = get_peft_model(tiny_model(architecture), MoEBiasConfig(num_experts=3, expert_rank=2, **choices)).double()
    placed = find_adapter_head(model)
    randomise(placed.active_layer, scale=0.3)
    base = model.get_base_model()
    states = RowStates(base, Head(placed.base_layer, placed.transform), temperature, memory)
    states.begin(placed.active_layer.support_or_all())
    AdaptedForward(placed, states, temperature, entropy_has_gradient, None).put_into(base)
    return model, states


def batch(rows=3, length=9, seed=0, left=False):
    """Token ids, a mask with padding, and labels of which some are not scored."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    attention = torch.ones_like(input_ids)
    for row in range(rows):
        hidden = slice(0, row) if left else slice(length - row, length)
        attention[row, hidden] = 0
    scored = torch.rand(input_ids.shape, generator=generator) < 0.6
    labels = torch.where(scored & attention.bool(), input_ids, IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention}, labels


def reference(model, inputs, labels, temperature):
    """The same fields from the model's own logits."""
    logits = model(**inputs).logits[:, :-1].double() / temperature
    next_ids, log_probs = labels[:, 1:], logits.log_softmax(-1)
    scored = next_ids != IGNORED
    found = {
        "log_probs": log_probs.gather(-1, next_ids.clamp(min=0)[..., None]).squeeze(-1),
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "is_top1": logits.argmax(-1) == next_ids,
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
    }
    return {name: value.masked_fill(~scored, 0) for name, value in found.items()}


def gradients_of(model, loss):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "cohere", "granite", "gpt2"])
@pytest.mark.parametrize("choices", [{"support": SUPPORT}, {}, {"support": SUPPORT, "experts": "free"}])
def test_every_field_and_gradient_is_that_of_the_whole_vocabulary(architecture, choices):
    model, _ = adapted(architecture, temperature=0.7, **choices)
    inputs, labels = batch()
    found = model(**inputs, labels=labels, fused_lm_head=True)
    expected = reference(model, inputs, labels, 0.7)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(found, name), expected[name].to(getattr(found, name).dtype), atol=1e-6, rtol=1e-6
        )
    count = (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(found.loss, -expected["log_probs"].sum() / count, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.label_mask, labels[:, 1:] != IGNORED)
    weights = torch.randn(labels[:, 1:].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for name in ("log_probs", "entropy"):
        ours = gradients_of(model, (weights * getattr(model(**inputs, labels=labels, fused_lm_head=True), name)).sum())
        theirs = gradients_of(model, (weights * reference(model, inputs, labels, 0.7)[name]).sum())
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(2, 12),
    seed=st.integers(0, 99),
    left=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    at_once=st.integers(1, 5),
    entropy_has_gradient=st.booleans(),
)
def test_any_batch_in_any_number_of_chunks(rows, length, seed, left, temperature, at_once, entropy_has_gradient):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scores_module,
            "chunks",
            lambda tokens, table: [slice(start, start + at_once) for start in range(0, max(tokens, 1), at_once)],
        )
        model, states = adapted(temperature=temperature, support=SUPPORT, entropy_has_gradient=entropy_has_gradient)
        inputs, labels = batch(rows, max(length, rows), seed, left)
        expected = reference(model, inputs, labels, temperature)
        for _ in range(2):
            found = model(**inputs, labels=labels, fused_lm_head=True)
            for name in FIELDS:
                value = getattr(found, name)
                torch.testing.assert_close(value, expected[name].to(value.dtype), atol=1e-6, rtol=1e-6)
            ours = gradients_of(model, found.log_probs.sum())
            theirs = gradients_of(model, reference(model, inputs, labels, temperature)["log_probs"].sum())
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        assert states.computed == rows


def test_without_the_adapter_it_is_the_frozen_model():
    model, _ = adapted(support=SUPPORT)
    inputs, labels = batch()
    with model.disable_adapter(), torch.no_grad():
        found = model(**inputs, labels=labels, fused_lm_head=True)
        expected = reference(model, inputs, labels, 1.0)
        plain = tiny_model().double()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, plain)
    for name in FIELDS:
        value = getattr(found, name)
        torch.testing.assert_close(value, expected[name].to(value.dtype), atol=1e-6, rtol=1e-6)


def test_a_row_is_computed_once_whatever_stands_beside_it():
    model, states = adapted(support=SUPPORT)
    inputs, labels = batch(rows=4)
    whole = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    assert states.computed == 4
    order = torch.tensor([2, 0])
    some = {name: value[order] for name, value in inputs.items()}
    torch.testing.assert_close(model(**some, labels=labels[order], fused_lm_head=True).log_probs, whole[order])
    wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in some.items()}
    padded = torch.nn.functional.pad(labels[order], (0, 3), value=IGNORED)
    torch.testing.assert_close(model(**wider, labels=padded, fused_lm_head=True).log_probs[:, :8], whole[order])
    assert states.computed == 4
    other = labels.clone()
    other[0] = IGNORED
    other[1, 1:] = inputs["input_ids"][1, 1:]
    model(**inputs, labels=other, fused_lm_head=True)
    assert states.computed == 6


def test_rows_beyond_the_memory_are_computed_again_and_it_is_said(caplog):
    model, states = adapted(support=SUPPORT, memory=3000)
    inputs, labels = batch(rows=4)
    for _ in range(2):
        model(**inputs, labels=labels, fused_lm_head=True)
    assert 4 < states.computed < 8
    assert caplog.text.count("the backbone is run for all others in every epoch") == 1


def test_dropout_of_the_backbone_is_off_and_the_mode_stays():
    model, _ = adapted("gpt2", support=SUPPORT)
    model.get_base_model().config.resid_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    inputs, labels = batch()
    model.train()
    found = model(**inputs, labels=labels, fused_lm_head=True)
    assert model.get_base_model().training
    model.eval()
    expected = reference(model, inputs, labels, 1.0)
    torch.testing.assert_close(found.log_probs, expected["log_probs"], atol=1e-6, rtol=1e-6)


def test_a_batch_without_a_scored_token_has_a_loss_of_zero_with_a_gradient():
    model, _ = adapted(support=SUPPORT)
    inputs, labels = batch()
    found = model(**inputs, labels=torch.full_like(labels, IGNORED), fused_lm_head=True)
    assert found.loss == 0
    found.loss.backward()


def test_what_is_no_text_is_refused():
    model, _ = adapted(support=SUPPORT)
    inputs, labels = batch()
    embeds = torch.zeros(*labels.shape, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="a batch with 'inputs_embeds' cannot be scored"):
        model.get_base_model()(**inputs, inputs_embeds=embeds, labels=labels, fused_lm_head=True)
