import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers.models import ARCHITECTURES, randomise, tiny_model, token_ids
from moe_bias import (
    MoEBiasConfig,
    apply_moe_bias,
    find_adapter_head,
    get_load_balance_loss,
    get_moe_bias_layer,
    load_moe_bias_layer,
    save_moe_bias_layer,
)
from moe_bias.layer import load_balance_loss

GENERATE = {
    "max_new_tokens": 4,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_hidden_states": True,
    "output_logits": True,
}


@pytest.fixture(autouse=True)
def _no_settings_of_the_developers_own(monkeypatch, tmp_path):
    for name in ("ENABLED", "NUM_EXPERTS", "TOP_K", "LOAD_BALANCE_WEIGHT", "ENTROPY_GATE", "CONFIG"):
        monkeypatch.delenv(f"MOE_BIAS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)


@torch.no_grad()
def forward(model, **kwargs):
    return model(input_ids=token_ids(), output_hidden_states=True, **kwargs)


def generate(model, **changes):
    ids = token_ids()
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**GENERATE, **changes})


# --- the logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("support", [None, [3, 5, 40]], ids=["whole", "support"])
def test_forward_logits_equal_those_of_the_peft_form(name, support, tmp_path):
    model = tiny_model(name)
    layer = get_moe_bias_layer(model, support=support)
    output = forward(model)
    assert torch.equal(apply_moe_bias(output, model), output.logits)
    randomise(layer, scale=0.3)
    adapted = apply_moe_bias(output, model).detach()
    save_moe_bias_layer(model, tmp_path)
    peft_model = PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(forward(peft_model).logits, adapted, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(adapted, output.logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_outputs_are_adapted_step_by_step(use_cache, beams):
    model = tiny_model()
    randomise(get_moe_bias_layer(model))
    output = generate(model, use_cache=use_cache, num_beams=beams)
    adapted = apply_moe_bias(output, model)
    assert len(adapted) == 4
    assert all(step.shape == (2 * beams, 97) for step in adapted)
    if beams == 1:
        with torch.no_grad():
            full = model(input_ids=output.sequences, output_hidden_states=True)
        expected = apply_moe_bias(full, model)[:, 6:-1]
        torch.testing.assert_close(torch.stack(adapted, 1), expected, rtol=1e-4, atol=1e-4)


def test_logits_of_the_last_positions_only():
    model = tiny_model()
    randomise(get_moe_bias_layer(model))
    some = apply_moe_bias(forward(model, logits_to_keep=2), model)
    torch.testing.assert_close(some, apply_moe_bias(forward(model), model)[:, -2:])


def test_half_precision_keeps_its_type():
    model = tiny_model().bfloat16()
    layer = get_moe_bias_layer(model)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer.hidden_mean.dtype == torch.float32
    randomise(layer)
    output = forward(model)
    adapted = apply_moe_bias(output, model)
    assert adapted.dtype == torch.bfloat16
    assert not torch.equal(adapted, output.logits)


def test_training_reaches_every_parameter_and_not_the_model():
    model = tiny_model()
    layer = get_moe_bias_layer(model)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    before = [parameter.clone() for parameter in layer.parameters()]
    for _ in range(3):
        logits = apply_moe_bias(model(input_ids=token_ids(), output_hidden_states=True), model)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids()[:, 1:].flatten())
        (loss + get_load_balance_loss(model)).backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not torch.equal(new, old) for new, old in zip(layer.parameters(), before, strict=True))


# --- the layer of a model -------------------------------------------------------------------------


def test_layer_is_made_once_per_model(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_NUM_EXPERTS", "4")
    monkeypatch.setenv("MOE_BIAS_TOP_K", "3")
    model, other = tiny_model(), tiny_model()
    layer = get_moe_bias_layer(model)
    assert (layer.config.num_experts, layer.config.top_k) == (4, 3)
    assert get_moe_bias_layer(model) is layer
    assert get_moe_bias_layer(other) is not layer
    assert not any("moe_bias" in name for name, _ in model.named_parameters())


def test_another_support_for_the_same_model_is_refused():
    model = tiny_model()
    get_moe_bias_layer(model, support=[3, 4])
    get_moe_bias_layer(model, support=[3, 4])
    with pytest.raises(ValueError, match="its support cannot be changed"):
        get_moe_bias_layer(model, support=[3, 5])


def test_variables_count_and_a_settings_file_does_not(monkeypatch, tmp_path):
    (tmp_path / "moe-bias.toml").write_text("[layer]\nnum_experts = 8\ntop_k = 4\n")
    monkeypatch.setenv("MOE_BIAS_TOP_K", "1")
    config = get_moe_bias_layer(tiny_model()).config
    assert (config.num_experts, config.top_k) == (4, 1)


def test_bad_variable_is_named(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_TOP_K", "many")
    with pytest.raises(ValueError, match=r"MOE_BIAS_TOP_K.*'many'"):
        get_moe_bias_layer(tiny_model())


def test_load_balance_loss_is_that_of_the_last_call_weighted(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_LOAD_BALANCE_WEIGHT", "0.5")
    model = tiny_model()
    with pytest.raises(ValueError, match="no call yet"):
        get_load_balance_loss(model)
    layer, output = get_moe_bias_layer(model), forward(model)
    apply_moe_bias(output, model)
    routing = layer.route(output.hidden_states[-1])
    torch.testing.assert_close(get_load_balance_loss(model), 0.5 * load_balance_loss(routing))
    counted = torch.zeros(2, 7, dtype=torch.bool)
    counted[:, 3:] = True
    torch.testing.assert_close(get_load_balance_loss(model, counted), 0.5 * load_balance_loss(routing, counted))


def test_layer_of_a_peft_model_is_its_active_adapters():
    peft_model = get_peft_model(tiny_model(), MoEBiasConfig(experts="free", num_experts=16))
    assert get_moe_bias_layer(peft_model) is find_adapter_head(peft_model).active_layer
    with peft_model.disable_adapter(), pytest.raises(ValueError, match="disabled or merged"):
        get_moe_bias_layer(peft_model)
    with pytest.raises(ValueError, match="its logits are adapted already"):
        apply_moe_bias(forward(peft_model), peft_model)


# --- what is refused ------------------------------------------------------------------------------


def test_disabled_it_returns_the_untouched_object(monkeypatch):
    monkeypatch.setenv("MOE_BIAS_ENABLED", "0")
    model = tiny_model()
    output = model(input_ids=token_ids())
    assert apply_moe_bias(output, model) is output.logits
    generated = generate(model, output_hidden_states=False)
    assert apply_moe_bias(generated, model) is generated.logits


def test_missing_hidden_states_and_logits_say_which_flag_to_pass():
    model = tiny_model()
    with pytest.raises(ValueError, match="pass output_hidden_states=True"):
        apply_moe_bias(model(input_ids=token_ids()), model)
    with pytest.raises(ValueError, match="pass output_hidden_states=True"):
        apply_moe_bias(generate(model, output_hidden_states=False), model)
    with pytest.raises(ValueError, match="return_dict_in_generate=True and output_logits=True"):
        apply_moe_bias(generate(model, output_logits=False), model)
    with pytest.raises(ValueError, match="return_dict_in_generate=True and output_logits=True"):
        apply_moe_bias(generate(model, return_dict_in_generate=False), model)


def test_hidden_states_that_the_head_does_not_read_are_refused():
    model = tiny_model()
    output = forward(model)
    wrong = CausalLMOutputWithPast(logits=output.logits, hidden_states=output.hidden_states[:-1])
    with pytest.raises(ValueError, match="returns other hidden states than its head reads"):
        apply_moe_bias(wrong, model)
    assert torch.equal(apply_moe_bias(output, model), output.logits)
    shifted = CausalLMOutputWithPast(logits=output.logits, hidden_states=(output.hidden_states[-1][:1],))
    with pytest.raises(ValueError, match="do not belong to"):
        apply_moe_bias(shifted, model)


# --- files ----------------------------------------------------------------------------------------


def test_either_form_loads_what_the_other_saved(tmp_path):
    peft_model = get_peft_model(
        tiny_model(), MoEBiasConfig(experts="free", num_experts=4, support=[3, 5, 40], strength=0.5)
    )
    randomise(find_adapter_head(peft_model).active_layer)
    expected = forward(peft_model).logits
    peft_model.save_pretrained(tmp_path / "peft")
    model = tiny_model()
    layer = load_moe_bias_layer(model, tmp_path / "peft")
    assert get_moe_bias_layer(model) is layer
    assert torch.equal(apply_moe_bias(forward(model), model), expected)
    save_moe_bias_layer(model, tmp_path / "functional")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "functional")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "functional")
    assert torch.equal(forward(again).logits, expected)


def test_files_that_do_not_fit_or_are_damaged_are_refused(tmp_path):
    save_moe_bias_layer(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="hidden states and vocabulary are 16 and 97 wide, here they are 32"):
        load_moe_bias_layer(tiny_model(hidden_size=32), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("directions"))
    save_file({**tensors, key: tensors[key] * torch.nan}, path)
    with pytest.raises(ValueError, match="'directions' holds NaN or infinite values"):
        load_moe_bias_layer(tiny_model(), tmp_path)
    save_file({name: value for name, value in tensors.items() if name != key}, path)
    with pytest.raises(ValueError, match="lacks tensor 'directions'"):
        load_moe_bias_layer(tiny_model(), tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_moe_bias_layer(tiny_model(), tmp_path)


def test_adapter_of_another_method_is_refused_by_name(tmp_path):
    from peft import LoraConfig

    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter of type 'LORA', not of MOE_BIAS"):
        load_moe_bias_layer(tiny_model(), tmp_path)


def test_loading_onto_a_peft_model_is_refused(tmp_path):
    save_moe_bias_layer(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="load another with its load_adapter"):
        load_moe_bias_layer(get_peft_model(tiny_model(), MoEBiasConfig(experts="free", num_experts=16)), tmp_path)
