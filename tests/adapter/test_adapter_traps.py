"""Ways to lose the bias, the adapter or the base model without a word: each is refused or works."""

import copy
import hashlib
import subprocess
import sys
from types import MethodType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from helpers.models import VOCABULARY, randomise, tiny_model, token_ids, word_tokenizer
from moe_bias import MoEBiasConfig, find_adapter_head, get_load_balance_loss
from moe_bias.backbone import captured_hidden

SUPPORT = [3, 5, 8, 40, 96]
FILE = "adapter_model.safetensors"


def adapted(model=None, **settings):
    peft_model = get_peft_model(
        model or tiny_model(), MoEBiasConfig(**{"experts": "free", "num_experts": 4, **settings})
    ).eval()
    randomise(find_adapter_head(peft_model).active_layer)
    return peft_model


@torch.no_grad()
def logits_of(model, **kwargs):
    return model(input_ids=token_ids(), **kwargs).logits


@pytest.fixture
def adapter_folder(tmp_path):
    adapted(support=SUPPORT).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- import order ---------------------------------------------------------------------------------

ORDERS = {
    # transformers looks for PEFT, without importing it, before anyone imports it
    "moe_bias first": "import moe_bias, importlib.util; importlib.util.find_spec('peft'); from peft import PeftConfig",
    "peft first": "from peft import PeftConfig; import moe_bias",
}


@pytest.mark.parametrize("order", ORDERS)
def test_method_is_registered_whatever_is_imported_first(order, adapter_folder):
    program = f"{ORDERS[order]}; print(PeftConfig.from_pretrained({str(adapter_folder)!r}).peft_type)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "PeftType.MOE_BIAS"


def test_without_the_import_peft_does_not_know_the_method(monkeypatch, adapter_folder):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "MOE_BIAS")
    with pytest.raises(KeyError, match="MOE_BIAS"):
        PeftModel.from_pretrained(tiny_model(), adapter_folder)


def test_import_alone_is_light():
    program = "import moe_bias, sys; assert not {'torch', 'peft', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_public_name_is_an_attribute_error():
    import moe_bias

    assert set(moe_bias.__all__) <= set(dir(moe_bias))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        moe_bias.nothing  # noqa: B018


# --- damaged and unfitting files ------------------------------------------------------------------


def through_peft(folder):
    return PeftModel.from_pretrained(tiny_model(), folder)


def through_peft_low_memory(folder):
    return PeftModel.from_pretrained(tiny_model(), folder, low_cpu_mem_usage=True)


def through_peft_ignoring_sizes(folder):
    return PeftModel.from_pretrained(tiny_model(), folder, ignore_mismatched_sizes=True)


def through_peft_load_adapter(folder):
    adapted().load_adapter(folder, "other")


def through_transformers(folder):
    tiny_model().load_adapter(str(folder))


def through_transformers_trainable(folder):
    model = tiny_model()
    model.load_adapter(str(folder), is_trainable=True)
    model(input_ids=token_ids())


ROUTES = (
    through_peft,
    through_peft_low_memory,
    through_peft_ignoring_sizes,
    through_peft_load_adapter,
    through_transformers,
    through_transformers_trainable,
)


def damage(folder, name, change):
    tensors = load_file(folder / FILE)
    key = next(key for key in tensors if key.endswith(name))
    changed = change(tensors.pop(key))
    save_file(tensors if changed is None else {**tensors, key: changed}, folder / FILE)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["experts", "router.weight", "entropy_gate.bias", "hidden_mean"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_by_every_route(route, name, value, adapter_folder):
    def spoil(tensor):
        tensor.view(-1)[0] = value
        return tensor

    damage(adapter_folder, name, spoil)
    with pytest.raises(ValueError, match=f"adapter tensor '{name}' holds NaN or infinite values") as caught:
        route(adapter_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("route", ROUTES[:4])
def test_misshapen_tensors_are_refused_in_one_sentence(route, adapter_folder):
    damage(adapter_folder, "experts", lambda tensor: tensor[:, :-1].contiguous())
    with pytest.raises(ValueError, match=r"'experts' has shape \(4, 4\), this model and config need \(4, 5\)"):
        route(adapter_folder)


@pytest.mark.parametrize("route", ROUTES[4:])
def test_misshapen_tensors_are_refused_by_transformers(route, adapter_folder):
    damage(adapter_folder, "experts", lambda tensor: tensor[:, :-1].contiguous())
    with pytest.raises(RuntimeError, match="mismatch"):
        route(adapter_folder)


@pytest.mark.parametrize("route", ROUTES[:4])
def test_missing_tensor_is_refused(route, adapter_folder):
    damage(adapter_folder, "experts", lambda tensor: None)
    with pytest.raises(ValueError, match="the adapter file lacks tensor 'experts'"):
        route(adapter_folder)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 32}, "made for hidden_size 32, the model has 16"),
        ({"vocab_size": 128}, "made for vocab_size 128, the model has 97"),
    ],
)
def test_adapter_of_another_model_is_refused_with_both_numbers(route, sizes, message, tmp_path):
    adapted(tiny_model(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        route(tmp_path)


# --- what PEFT and transformers do to a wrapped model ---------------------------------------------


def test_config_has_no_field_that_makes_peft_save_the_embedding():
    assert "target_modules" not in MoEBiasConfig(experts="free", num_experts=16).to_dict()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_tie_weights_after_wrapping_keeps_adapter_and_ties(name):
    model = tiny_model(name)
    peft_model = adapted(model)
    before = logits_of(peft_model)
    model.tie_weights()
    assert torch.equal(logits_of(peft_model), before)
    tied = model.get_input_embeddings().weight is find_adapter_head(model).base_layer.weight
    assert tied == (name == "llama-tied")


def test_assigning_weight_and_bias_reaches_the_base_layer():
    head = find_adapter_head(adapted())
    head.weight = nn.Parameter(torch.ones(VOCABULARY, 16))
    head.bias = nn.Parameter(torch.ones(VOCABULARY))
    assert head.base_layer.weight.eq(1).all()
    assert head.base_layer.bias.eq(1).all()
    assert not {"weight", "bias"} & set(dict(head.named_parameters(recurse=False)))


def test_resizing_the_vocabulary_is_refused_until_unloaded():
    model = tiny_model()
    peft_model = adapted(model)
    for resizable in (peft_model, model):
        with pytest.raises(ValueError, match="resize the model before attaching"):
            resizable.resize_token_embeddings(128)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    peft_model.unload().resize_token_embeddings(128)
    assert model.get_output_embeddings().out_features == 128


def test_mixing_with_lora_is_refused_whichever_comes_first():
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted().add_adapter("low_rank", lora)
    with pytest.raises(ValueError, match=r"Linear adapter at '.*q_proj'; one model cannot mix it with MoE-Bias"):
        get_peft_model(get_peft_model(tiny_model(), lora), MoEBiasConfig(experts="free", num_experts=16))
    model = tiny_model()
    model.add_adapter(lora, "low_rank")
    with pytest.raises(ValueError, match="one model cannot mix it with MoE-Bias"):
        model.add_adapter(MoEBiasConfig(experts="free", num_experts=16), "bias")
    model = tiny_model()
    model.add_adapter(MoEBiasConfig(experts="free", num_experts=16), "bias")
    with pytest.raises(ValueError, match="'low_rank' is not a MoE-Bias adapter of this model"):
        model.add_adapter(lora, "low_rank")
    with pytest.raises(ValueError, match="MOE_BIAS"):
        get_peft_model(tiny_model(), MoEBiasConfig(experts="free", num_experts=16), mixed=True)


def test_parameters_are_copied_by_their_dotted_name():
    """As TRL makes its 'ref' adapter; parameters in a ParameterDict would be left out."""
    peft_model = adapted()
    expected = logits_of(peft_model)
    peft_model.add_adapter("ref", peft_model.peft_config["default"])
    for name, parameter in peft_model.named_parameters():
        if ".default." in name:
            peft_model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    for name, buffer in peft_model.named_buffers():
        if ".default." in name:
            peft_model.get_buffer(name.replace(".default.", ".ref.")).copy_(buffer)
    peft_model.set_adapter("ref")
    assert torch.equal(logits_of(peft_model), expected)


def test_gradient_checkpointing_sends_no_gradient_into_the_backbone():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    peft_model = adapted(model).train()
    reached = []

    def watch(module, args, output):
        output.register_hook(reached.append)

    model.get_input_embeddings().register_forward_hook(watch)
    model.enable_input_require_grads()
    peft_model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert not reached
    assert find_adapter_head(model).active_layer.experts.grad.abs().sum() > 0


def test_copies_and_half_precision_after_a_training_step():
    peft_model = adapted().train()
    peft_model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    twin = copy.deepcopy(peft_model)
    assert find_adapter_head(peft_model).last.routing is not None
    assert find_adapter_head(twin).last.routing is None
    assert torch.equal(logits_of(twin), logits_of(peft_model))
    find_adapter_head(twin).active_layer.experts.data.zero_()
    assert not torch.equal(logits_of(twin), logits_of(peft_model))
    assert logits_of(twin.bfloat16()).dtype == torch.bfloat16


def test_adapter_stays_float32_on_a_half_precision_model(adapter_folder):
    peft_model = PeftModel.from_pretrained(tiny_model().bfloat16(), adapter_folder, autocast_adapter_dtype=False)
    saved = load_file(adapter_folder / FILE)
    for name, tensor in find_adapter_head(peft_model).active_layer.state_dict().items():
        assert torch.equal(tensor, saved[f"base_model.model.lm_head.moe_bias_layers.{name}"])


# --- offloading -----------------------------------------------------------------------------------


def files_hash(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def test_model_on_disk_is_refused_and_its_files_stay(tmp_path, adapter_folder):
    base = tmp_path / "models--tiny"
    tiny_model().save_pretrained(base)
    before = files_hash(base)
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map["model.rotary_emb"] = "cpu"
    for attach in (
        lambda model: get_peft_model(model, MoEBiasConfig(experts="free", num_experts=16)),
        lambda model: PeftModel.from_pretrained(model, adapter_folder),
        lambda model: model.load_adapter(str(adapter_folder)),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            base, device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
        )
        with pytest.raises(ValueError, match=r"'model\.layers' of the model is offloaded to disk"):
            attach(model)
    assert files_hash(base) == before


def test_offloaded_head_computes_and_its_adapter_is_not_on_meta():
    from accelerate import cpu_offload

    model = tiny_model()
    base = logits_of(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    peft_model = get_peft_model(model, MoEBiasConfig(experts="free", num_experts=4)).eval()
    assert torch.equal(logits_of(peft_model), base)
    layer = find_adapter_head(peft_model).active_layer
    assert not any(parameter.is_meta for parameter in layer.parameters())
    randomise(layer)
    torch.testing.assert_close(logits_of(peft_model), logits_of(adapted()))


# --- who goes past the head -----------------------------------------------------------------------


def fused_forward(self, input_ids, labels=None, **kwargs):
    """What Liger's and TRL's fused losses do: multiply with the head's weight themselves."""
    hidden = self.model(input_ids=input_ids).last_hidden_state
    return CausalLMOutputWithPast(logits=hidden @ self.get_output_embeddings().weight.T)


def test_fused_forward_is_refused_while_an_adapter_is_active():
    model = tiny_model()
    base = logits_of(model)
    peft_model = adapted(model)
    model.forward = MethodType(fused_forward, model)
    for run in (model, peft_model):
        with pytest.raises(ValueError, match="LlamaForCausalLM went past its output embedding"):
            run(input_ids=token_ids())
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits_of(peft_model), base)
    peft_model.unload()
    torch.testing.assert_close(logits_of(model), base)


def test_head_put_in_the_adapters_place_is_refused():
    """As assisted decoding across tokenizers does with the assistant's head."""
    model = tiny_model()
    adapted(model)
    model.set_output_embeddings(nn.Linear(16, 10, bias=False))
    with pytest.raises(ValueError, match="went past its output embedding"):
        logits_of(model)


def test_trl_refuses_the_adapter_and_its_fused_head_is_refused_where_it_does_not(tmp_path):
    trl_utils = pytest.importorskip("trl.trainer.utils")
    model = tiny_model()
    trl_utils.add_fused_lm_head(model)
    model.add_adapter(MoEBiasConfig(experts="free", num_experts=4))
    with pytest.raises(ValueError, match="went past its output embedding"):
        model(input_ids=token_ids(), labels=token_ids(), fused_lm_head=True)
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [("PeftModel", "PEFT adapter to `lm_head` is not supported"), ("add_adapter", "went past its output embedding")],
)
def test_trl_sft_does_not_train_without_gradient(wrapped, message, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = tiny_model()
    data = Dataset.from_dict({"input_ids": [list(range(3, 12))] * 2})
    if wrapped == "PeftModel":
        model = get_peft_model(model, MoEBiasConfig(experts="free", num_experts=4))
    else:
        model.add_adapter(MoEBiasConfig(experts="free", num_experts=4))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=1
    )
    with pytest.raises(ValueError, match=message):
        trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=word_tokenizer()).train()


def test_trl_takes_no_peft_config_of_ours(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": [list(range(3, 12))] * 2})
    arguments = trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        trl.SFTTrainer(
            tiny_model(),
            args=arguments,
            train_dataset=data,
            processing_class=word_tokenizer(),
            peft_config=MoEBiasConfig(experts="free", num_experts=4),
        ).train()


def test_transformers_trainer_trains_the_adapter(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    peft_model = get_peft_model(tiny_model(), MoEBiasConfig(experts="free", num_experts=4))
    rows = [list(range(3, 12))] * 4
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, report_to="none", use_cpu=True, save_strategy="no"
    )
    Trainer(peft_model, arguments, train_dataset=data).train()
    assert find_adapter_head(peft_model).active_layer.experts.abs().max() > 0.01


def test_logits_to_keep_is_safe():
    peft_model = adapted()
    torch.testing.assert_close(logits_of(peft_model, logits_to_keep=2), logits_of(peft_model)[:, -2:])


def test_hidden_states_are_captured_under_an_active_adapter():
    peft_model = adapted()
    with torch.no_grad(), captured_hidden(peft_model) as seen:
        peft_model(input_ids=token_ids())
    assert seen[0].shape == (2, 7, 16)


def test_load_balance_loss_is_not_part_of_the_models_loss():
    """The Trainer would weigh a loss that a hook adds wrongly; it has to be added by hand."""
    ids = token_ids()
    peft_model = adapted(load_balance_weight=1e6).train()
    loss = peft_model(input_ids=ids, labels=ids).loss
    assert loss < 100
    assert get_load_balance_loss(peft_model) > 1e5


def test_what_was_changed_in_a_config_is_looked_at_again():
    config = MoEBiasConfig(support=[3, 5], num_experts=1, top_k=1)
    assert config.layer_config() is config.layer_config()
    config.support.append(8)
    assert config.layer_config().support == (3, 5, 8)
    config.num_experts = True
    with pytest.raises(ValueError, match="num_experts"):
        config.layer_config()
    assert copy.copy(MoEBiasConfig(support=[4])).layer_config().support == (4,)
