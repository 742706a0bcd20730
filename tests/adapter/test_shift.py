"""An adapter as a shift of the hidden states, beside the adapter at the output embedding."""

import copy
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers.models import randomise, tiny_model, token_ids, word_tokenizer
from moe_bias import (
    HiddenShift,
    MoEBiasConfig,
    apply_moe_bias,
    find_adapter_head,
    get_load_balance_loss,
    get_moe_bias_layer,
    load_moe_bias_layer,
    save_moe_bias_layer,
    shift_hidden_states,
)
from moe_bias.backbone import HeadTransform, find_head, hidden_states
from moe_bias.mistakes import UserError

LINEAR = {"num_experts": 4, "experts": "linear", "expert_rank": 3, "entropy_gate": False}
KINDS = [LINEAR, {**LINEAR, "experts": "directions"}, {**LINEAR, "support": [3, 5, 8], "reach": "vocabulary"}]
ARCHITECTURES = ["llama", "llama-tied", "qwen3", "cohere", "granite", "gpt2", "phi", "gpt_neox"]


def adapted(model=None, **settings):
    peft_model = get_peft_model(model or tiny_model(), MoEBiasConfig(**{**LINEAR, "strength": 0.7, **settings})).eval()
    randomise(find_adapter_head(peft_model).active_layer, scale=0.3)
    return peft_model


@torch.no_grad()
def logits_of(model, **kwargs):
    return model(input_ids=token_ids(), **kwargs).logits


def by_hand(model):
    """Final logits as a loss of one's own makes them: the backbone's last hidden states times the head's weight."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    hidden = base.base_model(input_ids=token_ids()).last_hidden_state
    return find_adapter_head(model).transform.apply(F.linear(hidden, head.weight, head.bias))


def loss_of(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids()[:, 1:].flatten())


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS, ids=["linear", "directions", "reach"])
def test_logits_are_those_of_the_adapter_whoever_computes_them(name, kind):
    peft_model = adapted(tiny_model(name), **kind)
    with peft_model.disable_adapter():
        base = logits_of(peft_model)
    expected = logits_of(peft_model)
    assert (expected - base).abs().max() > 0.05
    with shift_hidden_states(peft_model):
        torch.testing.assert_close(logits_of(peft_model), expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(by_hand(peft_model).detach(), expected, rtol=1e-4, atol=2e-5)
        with peft_model.disable_adapter():
            assert torch.equal(logits_of(peft_model), base)
    assert torch.equal(logits_of(peft_model), expected)


@pytest.mark.parametrize("name", ["llama-tied", "cohere", "phi"])
def test_gradients_are_those_of_the_adapter(name):
    peft_model = adapted(tiny_model(name)).train()
    loss_of(peft_model(input_ids=token_ids()).logits).backward()
    expected = gradients(peft_model)
    assert len(expected) == 4
    with shift_hidden_states(peft_model):
        loss_of(by_hand(peft_model)).backward()
    found = gradients(peft_model)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", ["llama", "cohere", "granite", "phi"])
def test_trls_fused_loss_is_that_of_the_adapter(name):
    trl_utils = pytest.importorskip("trl.trainer.utils")
    model, ids = tiny_model(name), token_ids()
    trl_utils.add_fused_lm_head(model)
    peft_model = adapted(model).train()
    expected = peft_model(input_ids=ids, labels=ids).loss
    expected.backward()
    expected_gradients = gradients(peft_model)
    with pytest.raises(UserError, match=r"shift_hidden_states\(model\)"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    with shift_hidden_states(model):
        loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in gradients(peft_model).items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-3, atol=1e-6, msg=parameter)


def test_trl_trains_the_adapter_as_a_shift(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    peft_model = get_peft_model(tiny_model(), MoEBiasConfig(**LINEAR))
    model = peft_model.get_base_model()
    before = model.lm_head.base_layer.weight.clone()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, report_to="none", use_cpu=True, bf16=False
    )
    data = Dataset.from_dict({"input_ids": [list(range(3, 12))] * 4})
    with shift_hidden_states(model):
        trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=word_tokenizer()).train()
    assert find_adapter_head(model).active_layer.directions.abs().max() > 0.01
    assert torch.equal(model.lm_head.base_layer.weight, before)


@pytest.mark.parametrize("name", ["llama", "cohere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_the_hidden_state_once(name, dtype):
    peft_model = adapted(tiny_model(name).to(dtype))
    head = find_adapter_head(peft_model)
    with shift_hidden_states(peft_model):
        found = logits_of(peft_model).float()
    hidden = hidden_states(peft_model, token_ids(), torch.ones_like(token_ids())).to(dtype)
    exact = copy.deepcopy(head.active_layer)
    shifted = HiddenShift(exact, head.transform)(hidden.float()).detach()
    weight = head.base_layer.weight.float()
    expected = head.transform.scale * shifted @ weight.T
    # The rounding of the hidden state, through the weight, and that of the logits; a scale rounds again.
    half = torch.finfo(dtype).eps
    bound = half * head.transform.scale * (shifted.abs() @ weight.abs().T) + 2 * half * expected.abs() + 1e-4
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("llama", {"entropy_gate": True}, "with the entropy gate its bias depends on the base distribution"),
        ("llama", {"support": [3, 5, 8]}, "it acts on 3 tokens alone"),
        ("llama", {"free_entries": True}, "its free entries move each token"),
        ("llama", {"experts": "free"}, "free experts move each token"),
        ("gemma2", {}, "the model soft-caps its logits at 2"),
    ],
)
def test_what_is_no_shift_is_refused_with_the_reason(name, settings, reason):
    peft_model = adapted(tiny_model(name), **settings)
    before = logits_of(peft_model)
    with pytest.raises(UserError, match=f"cannot shift the hidden states: {reason}"):
        shift_hidden_states(peft_model)
    assert torch.equal(logits_of(peft_model), before)


def test_a_layer_that_has_become_no_shift_is_refused_at_the_next_forward():
    peft_model = adapted(support=[3, 5, 8], reach="vocabulary")
    with shift_hidden_states(peft_model):
        find_adapter_head(peft_model).active_layer.reach = "support"
        with pytest.raises(UserError, match="it acts on 3 tokens alone"):
            logits_of(peft_model)


class ScalingForCausalLM(type(tiny_model())):
    """Scales the hidden states before the head, as T5 does where embeddings are tied."""

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(0.5 * hidden))


class HeadlessForCausalLM(type(tiny_model())):
    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)


@pytest.mark.parametrize("kind", [ScalingForCausalLM, HeadlessForCausalLM])
def test_a_model_that_changes_hidden_states_before_its_head_is_refused_by_name(kind):
    model = tiny_model()
    peft_model = adapted(model)
    expected = logits_of(peft_model)
    model.__class__ = kind
    with pytest.raises(UserError, match=f"{kind.__name__} does something between its backbone and its output"):
        shift_hidden_states(peft_model)
    model.__class__ = type(tiny_model())
    assert torch.equal(logits_of(peft_model), expected)


def test_a_model_without_a_backbone_is_refused():
    model = tiny_model()
    peft_model = adapted(model)
    model.base_model_prefix, model._modules["inner"] = "nothing", model._modules.pop("model")
    with pytest.raises(UserError, match="LlamaForCausalLM has no separate backbone"):
        shift_hidden_states(peft_model)


def test_a_forward_past_the_backbone_too_is_still_refused():
    model = tiny_model()
    peft_model = adapted(model)
    shift_hidden_states(peft_model)
    model.forward = MethodType(lambda self, **_: CausalLMOutputWithPast(logits=torch.zeros(1)), model)
    with pytest.raises(UserError, match="went past its output embedding"):
        model(input_ids=token_ids())


def test_another_adapter_is_applied_from_the_next_forward_on():
    peft_model = adapted()
    peft_model.add_adapter("other", MoEBiasConfig(**{**LINEAR, "experts": "directions"}))
    randomise(find_adapter_head(peft_model).moe_bias_layers["other"], seed=2, scale=0.3)
    peft_model.set_adapter("other")
    expected = logits_of(peft_model)
    peft_model.set_adapter("default")
    with shift_hidden_states(peft_model):
        assert not torch.allclose(logits_of(peft_model), expected)
        peft_model.set_adapter("other")
        torch.testing.assert_close(logits_of(peft_model), expected, rtol=1e-4, atol=2e-5)


def test_a_second_shift_is_refused_and_unloading_takes_the_first_away():
    model = tiny_model()
    base = logits_of(model)
    peft_model = adapted(model)
    shift_hidden_states(peft_model)
    with pytest.raises(UserError, match="shifted already"):
        shift_hidden_states(peft_model)
    assert torch.equal(logits_of(peft_model.unload()), base)


def test_a_copy_of_a_shifted_model_is_shifted_by_its_own_layer():
    peft_model = adapted()
    shift = shift_hidden_states(peft_model)
    expected = logits_of(peft_model)
    twin = copy.deepcopy(peft_model)
    with torch.no_grad():
        find_adapter_head(peft_model).active_layer.directions.add_(1)
    assert torch.equal(logits_of(twin), expected)
    shift.remove()
    assert torch.equal(logits_of(twin), expected)
    find_adapter_head(twin).shift.remove()
    torch.testing.assert_close(logits_of(twin), expected, rtol=1e-4, atol=2e-5)


def test_hidden_states_are_not_read_while_they_are_shifted_from_a_copy_neither():
    peft_model = adapted()
    mask = torch.ones_like(token_ids())
    expected = hidden_states(peft_model.get_base_model(), token_ids(), mask)
    with shift_hidden_states(peft_model):
        twin = copy.deepcopy(peft_model)
        for model in (peft_model, twin):
            with pytest.raises(UserError, match="shifted by an adapter"):
                hidden_states(model.get_base_model(), token_ids(), mask)
    find_adapter_head(twin).shift.remove()
    for model in (peft_model, twin):
        assert torch.equal(hidden_states(model.get_base_model(), token_ids(), mask), expected)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_list_of_hidden_states_and_outputs_without_names(return_dict):
    peft_model = adapted()
    base = peft_model.get_base_model()
    with torch.no_grad():
        plain = base.model(input_ids=token_ids(), output_hidden_states=True)
        with shift_hidden_states(peft_model):
            found = base.model(input_ids=token_ids(), output_hidden_states=True, return_dict=return_dict)
    head = find_adapter_head(peft_model)
    expected = HiddenShift(head.active_layer, head.transform)(plain.last_hidden_state).detach()
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(plain.hidden_states[0], base.model.embed_tokens(token_ids()))
    if return_dict:
        torch.testing.assert_close(found.hidden_states[-1], expected)
        assert all(map(torch.equal, found.hidden_states[:-1], plain.hidden_states[:-1]))


def test_a_fresh_shift_leaves_every_bit_and_generation_follows_a_trained_one():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        base = logits_of(model)
        peft_model = get_peft_model(model, MoEBiasConfig(**LINEAR)).eval()
        with shift_hidden_states(peft_model):
            assert torch.equal(logits_of(peft_model), base)
    peft_model = adapted()
    options = {"input_ids": token_ids(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = peft_model.generate(**options)
    with shift_hidden_states(peft_model):
        assert torch.equal(peft_model.generate(**options), expected)


def test_no_gradient_enters_the_backbone_and_the_load_can_be_balanced():
    peft_model = adapted(load_balance_weight=1.0).train()
    peft_model(input_ids=token_ids())
    expected = get_load_balance_loss(peft_model)
    with shift_hidden_states(peft_model):
        hidden = peft_model.get_base_model().model(input_ids=token_ids()).last_hidden_state
        torch.testing.assert_close(get_load_balance_loss(peft_model), expected)
    shift = HiddenShift(find_adapter_head(peft_model).active_layer, HeadTransform())
    leaf = torch.randn(3, 16, requires_grad=True)
    assert hidden.requires_grad
    shift(leaf).sum().backward()
    assert leaf.grad is None


# --- without PEFT -----------------------------------------------------------------------------------


@pytest.fixture
def settings(monkeypatch):
    for name, value in LINEAR.items():
        monkeypatch.setenv(f"MOE_BIAS_{name.upper()}", str(value))
    return monkeypatch


def test_the_four_line_layer_is_shifted_alike(settings, tmp_path):
    model = tiny_model("cohere")
    layer = get_moe_bias_layer(model)
    randomise(layer, scale=0.3)
    with torch.no_grad():
        output = model(input_ids=token_ids(), output_hidden_states=True)
        expected = apply_moe_bias(output, model)
    with shift_hidden_states(model):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=2e-5)
        with pytest.raises(UserError, match="shifted, so its logits are adapted already"):
            apply_moe_bias(output, model)
        save_moe_bias_layer(model, tmp_path)
        with pytest.raises(UserError, match=r"remove\(\) the shift before loading another"):
            load_moe_bias_layer(model, tmp_path)
        model(input_ids=token_ids())
        assert get_load_balance_loss(model) > 0
        settings.setenv("MOE_BIAS_ENABLED", "0")
        assert torch.equal(logits_of(model), output.logits)
    torch.testing.assert_close(apply_moe_bias(output, model), output.logits)


def test_the_shift_by_hand():
    """One direction and one rank: d = s / sigma (c + u (v . n(h)))."""
    model = tiny_model()
    layer = find_head(model)[1].layer(
        MoEBiasConfig(num_experts=1, top_k=1, experts="linear", expert_rank=1, entropy_gate=False).layer_config()
    )
    randomise(layer)
    layer.strength = 2.0
    hidden = torch.randn(5, 16)
    normed = (hidden - layer.hidden_mean) / layer.hidden_scale
    read = normed @ layer.reads[0, 0]
    expected = hidden + 2.0 / 0.25 * (layer.directions[0] + read[:, None] * layer.writes[0, 0])
    torch.testing.assert_close(HiddenShift(layer, HeadTransform(0.25))(hidden), expected)
    assert isinstance(HiddenShift(layer, HeadTransform()), nn.Module)
