import hashlib
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, pipeline
from transformers.cache_utils import Cache

from helpers.models import HIDDEN, VOCABULARY, randomise, tiny_model, token_ids, word_tokenizer
from moe_bias import (
    LayerConfig,
    MoEBiasConfig,
    MoEBiasLayer,
    find_adapter_head,
    get_load_balance_loss,
    get_moe_bias_layer,
    load_moe_bias_layer,
    push_to_hub,
)
from moe_bias.adapter import read_adapter, save_layer
from moe_bias.mistakes import UserError

SUPPORT = [2, 3, 5, 8, 40, 96]
GENERATE = {"max_new_tokens": 8, "pad_token_id": 0}


def with_adapter(model, seed=1, **settings):
    """The model under an adapter whose bias is large enough to change what it generates."""
    peft_model = get_peft_model(model, MoEBiasConfig(**{"experts": "free", "num_experts": 4, **settings})).eval()
    randomise(find_adapter_head(peft_model).active_layer, seed=seed, scale=3.0)
    return peft_model


@pytest.fixture
def base_folder(tmp_path):
    """A saved base model, so that an adapter can name it."""
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model, ids=None):
    return model(input_ids=token_ids() if ids is None else ids).logits


def weights_hash(model):
    """Of every base weight under its own name, with or without the wrappers around the model."""
    own = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor
        for name, tensor in model.state_dict().items()
        if "moe_bias_layers" not in name
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(own.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0: input should be greater than or equal to 1"),
        ({"top_k": 0}, "top_k is 0: input should be greater than or equal to 1"),
        ({"num_experts": 1}, "top_k = 2 is more than num_experts = 1"),
        ({"support": []}, "support is empty"),
        ({"support": [4, 4]}, "support id 4 stands more than once"),
        ({"support": [-1]}, "support id -1 is negative"),
        ({"load_balance_weight": -0.5}, "load_balance_weight is -0.5"),
        ({"strength": float("nan")}, "strength is nan"),
    ],
)
def test_settings_that_cannot_be_built_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        MoEBiasConfig(experts="free", **settings)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_those_of_the_layer():
    assert MoEBiasConfig().layer_config() == LayerConfig()


def test_support_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="support id 97 is outside the vocabulary of 97 tokens"):
        get_peft_model(tiny_model(), MoEBiasConfig(experts="free", support=[97]))


def test_the_config_is_the_models_own_and_fits_a_second_model():
    config = MoEBiasConfig(experts="free", num_experts=16)
    first, second = (get_peft_model(tiny_model(hidden_size=width), config).peft_config["default"] for width in (16, 32))
    assert first is config
    assert (first.hidden_size, second.hidden_size) == (16, 32)
    assert first.embedding_sample != second.embedding_sample
    assert "_given" not in first.to_dict()


def test_a_config_for_other_sizes_stays_so():
    config = MoEBiasConfig(hidden_size=32, vocab_size=97)
    for _ in range(2):
        with pytest.raises(UserError, match="made for hidden_size 32, the model has 16"):
            get_peft_model(tiny_model(), config)


@pytest.mark.parametrize("experts", ["free", "linear"])
def test_a_single_expert_has_no_router_and_files_that_have_one_load(tmp_path, experts):
    config = MoEBiasConfig(experts=experts, num_experts=1, top_k=1)
    peft_model = get_peft_model(tiny_model(), config)
    layer = find_adapter_head(peft_model).active_layer
    assert not [name for name, _ in layer.named_parameters() if "router" in name]
    assert sum(p.numel() for p in layer.parameters()) == config.layer_config().num_parameters(HIDDEN, VOCABULARY)
    randomise(layer)
    expected = logits_of(peft_model)
    peft_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in tensors if "router" in name]
    place = next(iter(tensors)).partition("moe_bias_layers")[0]
    tensors[f"{place}moe_bias_layers.router.weight"] = torch.ones(1, HIDDEN)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits_of(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)
    load_moe_bias_layer(plain := tiny_model(), tmp_path)
    assert torch.equal(get_moe_bias_layer(plain).table(), layer.table())


def test_trainable_parameters_are_those_of_the_layer():
    peft_model = get_peft_model(tiny_model(), MoEBiasConfig(experts="free", num_experts=4, support=SUPPORT))
    trainable, _ = peft_model.get_nb_trainable_parameters()
    assert trainable == 4 * (len(SUPPORT) + 16) + 2


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [None, SUPPORT], ids=["whole", "support"])
def test_every_way_of_loading_gives_the_same_bits(base_folder, tmp_path, support):
    peft_model = with_adapter(load_base(base_folder), support=support, fork_coverage=0.9)
    expected = logits_of(peft_model)
    folder = tmp_path / "adapter"
    peft_model.save_pretrained(folder)

    through_transformers = load_base(base_folder)
    through_transformers.load_adapter(str(folder))
    loaded = {
        "PeftModel": PeftModel.from_pretrained(load_base(base_folder), folder),
        "low memory": PeftModel.from_pretrained(load_base(base_folder), folder, low_cpu_mem_usage=True),
        "trainable": PeftModel.from_pretrained(load_base(base_folder), folder, is_trainable=True),
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(folder),
        "AutoModel": AutoModelForCausalLM.from_pretrained(folder).eval(),
        "load_adapter": through_transformers,
    }
    for way, model in loaded.items():
        assert torch.equal(logits_of(model), expected), way
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, MoEBiasConfig)
    assert (config.hidden_size, config.vocab_size, config.fork_coverage) == (16, VOCABULARY, 0.9)


def test_reloaded_in_a_fresh_process_it_is_bit_identical(base_folder, tmp_path):
    peft_model = with_adapter(load_base(base_folder), support=SUPPORT)
    peft_model.save_pretrained(tmp_path / "adapter")
    torch.save({"ids": token_ids(), "logits": logits_of(peft_model)}, tmp_path / "expected.pt")
    program = f"""
        import torch, moe_bias
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        with torch.no_grad():
            assert torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True)


@pytest.mark.parametrize("tied", [False, True])
def test_files_hold_adapter_tensors_only(tmp_path, tied):
    peft_model = with_adapter(tiny_model("llama-tied" if tied else "llama"))
    peft_model.save_pretrained(tmp_path)
    names = {
        key.removeprefix("base_model.model.lm_head.moe_bias_layers.")
        for key in load_file(tmp_path / "adapter_model.safetensors")
    }
    assert names == {
        "router.weight",
        "experts",
        "entropy_gate.weight",
        "entropy_gate.bias",
        "hidden_mean",
        "hidden_scale",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_model_card_says_what_the_adapter_is(base_folder, tmp_path):
    peft_model = with_adapter(load_base(base_folder), support=SUPPORT, fork_coverage=0.85)
    peft_model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"base_model: {base_folder}" in card
    assert "- moe-bias" in card
    assert "| experts | 4, 2 per token |" in card
    assert "85.0%" in card
    assert "[More Information Needed]" not in card


def test_card_written_by_hand_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    with_adapter(tiny_model()).save_pretrained(tmp_path)
    assert "Mine." in (tmp_path / "README.md").read_text()


def test_push_to_hub_uploads_the_adapter_and_a_card(monkeypatch):
    uploaded = []

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

        def create_commit(self, operations, **_):
            uploaded.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    with_adapter(tiny_model()).push_to_hub("someone/adapter")
    assert sorted(uploaded) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_our_push_to_hub_keeps_the_adapters_own_card(monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, **_):
            uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return "address"

    monkeypatch.setattr("moe_bias.adapter.card.HfApi", Hub)
    assert push_to_hub(with_adapter(tiny_model()), "someone/adapter", token="secret") == "address"
    assert sorted(uploaded) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert b"# adapter\n\nA MoE-Bias adapter" in uploaded["README.md"]


def test_a_layer_that_stands_alone_is_saved_as_an_adapter(base_folder, tmp_path):
    model = load_base(base_folder)
    layer = MoEBiasLayer(LayerConfig(experts="free", num_experts=4, support=tuple(SUPPORT)), 16, VOCABULARY)
    randomise(layer)
    layer.strength = 0.5
    save_layer(layer, tmp_path / "adapter", model, fork_coverage=0.7)
    peft_model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = find_adapter_head(peft_model).active_layer
    assert loaded.strength == 0.5
    for name, tensor in layer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    config, tensors = read_adapter(tmp_path / "adapter")
    assert config.fork_coverage == 0.7
    assert len(tensors) == 6


# --- several adapters -----------------------------------------------------------------------------


def test_adapters_switch_off_and_on_and_go(tmp_path):
    model = tiny_model()
    base = logits_of(model)
    peft_model = with_adapter(model)
    first = logits_of(peft_model)
    peft_model.add_adapter("other", MoEBiasConfig(experts="free", num_experts=8, support=SUPPORT))
    assert torch.equal(logits_of(peft_model), first)
    peft_model.set_adapter("other")
    assert torch.equal(logits_of(peft_model), base)
    randomise(find_adapter_head(peft_model).active_layer)
    second = logits_of(peft_model)
    assert not torch.equal(second, first)
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(peft_model), base)
    peft_model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "other" / "adapter_model.safetensors")) == 6
    peft_model.delete_adapter("other")
    assert peft_model.active_adapter == "default"
    assert torch.equal(logits_of(peft_model), first)
    assert torch.equal(logits_of(peft_model.unload()), base)


def test_only_the_active_adapter_is_trainable():
    peft_model = with_adapter(tiny_model())
    peft_model.add_adapter("other", MoEBiasConfig(experts="free", num_experts=4))
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".default." in name for name in trainable)


def test_an_adapter_deleted_before_it_was_used_leaves_no_trace():
    peft_model = with_adapter(tiny_model())
    peft_model.add_adapter("other", MoEBiasConfig(experts="free", num_experts=16))
    peft_model.delete_adapter("other")
    peft_model.eval()
    assert list(find_adapter_head(peft_model).moe_bias_layers) == ["default"]
    logits_of(peft_model)


def test_deleting_the_last_adapter_leaves_the_base_model():
    model = tiny_model()
    base = logits_of(model)
    peft_model = with_adapter(model)
    peft_model.delete_adapter("default")
    assert torch.equal(logits_of(model), base)


def test_transformers_own_verbs(base_folder, tmp_path):
    model = load_base(base_folder)
    base = logits_of(model)
    model.add_adapter(MoEBiasConfig(experts="free", num_experts=4), "one")
    randomise(find_adapter_head(model).active_layer, scale=3.0)
    adapted = logits_of(model)
    assert not torch.equal(adapted, base)
    model.disable_adapters()
    assert torch.equal(logits_of(model), base)
    model.enable_adapters()
    assert torch.equal(logits_of(model), adapted)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = load_base(base_folder)
    reloaded.load_adapter(str(tmp_path / "adapter"), "two")
    assert torch.equal(logits_of(reloaded), adapted)
    model.delete_adapter("one")
    assert torch.equal(logits_of(model), base)


@torch.no_grad()
def test_strength_scales_the_bias_at_run_time():
    model = tiny_model()
    base = logits_of(model)
    peft_model = with_adapter(model, entropy_gate=False)
    move = logits_of(peft_model) - base
    head = find_adapter_head(peft_model)
    head.active_layer.strength = 0.5
    torch.testing.assert_close(logits_of(peft_model) - base, 0.5 * move, rtol=1e-4, atol=1e-4)
    head.active_layer.strength = 0.0
    assert torch.equal(logits_of(peft_model), base)


# --- generation -----------------------------------------------------------------------------------


def reference_greedy(model, ids, mask, steps):
    """Greedy decoding without cache, one full forward per token."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_repeated_arg_max_of_the_adapted_logits(use_cache):
    model, ids = tiny_model(), token_ids()
    base = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, **GENERATE)
    peft_model = with_adapter(model, support=list(range(3, 60)))
    adapted = peft_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
        **GENERATE,
    )
    assert torch.equal(adapted, reference_greedy(peft_model, ids, torch.ones_like(ids), 8))
    assert not torch.equal(adapted, base)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_fresh_adapter_generates_what_the_base_generates(sampling):
    model, ids = tiny_model(), token_ids()
    outputs = []
    for candidate in (model, get_peft_model(tiny_model(), MoEBiasConfig(experts="free", num_experts=16))):
        torch.manual_seed(0)
        outputs.append(candidate.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling, **GENERATE))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("sampling", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_sampling_and_beams_follow_the_adapter(sampling):
    """A bias that leaves one token possible makes every strategy choose it."""
    peft_model = get_peft_model(
        tiny_model(), MoEBiasConfig(experts="free", num_experts=4, support=[42], entropy_gate=False)
    )
    find_adapter_head(peft_model).active_layer.experts.data.fill_(1e4)
    ids = token_ids()
    output = peft_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling, **GENERATE)
    assert (output[:, ids.shape[1] :] == 42).all()


def test_left_padding_does_not_change_an_answer():
    peft_model, ids = with_adapter(tiny_model()), token_ids(batch=1)
    alone = peft_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **GENERATE)
    padding = torch.zeros(1, 3, dtype=ids.dtype)
    batch = torch.cat([torch.cat([padding, ids], 1), token_ids(batch=1, length=10, seed=5)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    together = peft_model.generate(input_ids=batch, attention_mask=mask, do_sample=False, **GENERATE)
    assert torch.equal(together[0, 10:][: alone.shape[1] - 7], alone[0, 7:])


def test_text_generation_pipeline():
    peft_model = get_peft_model(
        tiny_model(), MoEBiasConfig(experts="free", num_experts=4, support=[42], entropy_gate=False)
    ).eval()
    find_adapter_head(peft_model).active_layer.experts.data.fill_(1e4)
    generate = pipeline("text-generation", model=peft_model, tokenizer=word_tokenizer())
    text = generate("w3 w4 w5", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text == "w3 w4 w5w42 w42 w42"


@torch.no_grad()
def decode(model, ids, cache: Cache):
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def test_decode_step_compiles_without_graph_break():
    peft_model, ids = with_adapter(tiny_model(), support=SUPPORT), token_ids(length=1)
    torch._dynamo.reset()
    compiled = torch.compile(peft_model.get_base_model(), backend="aot_eager", fullgraph=True)
    expected = logits_of(peft_model, ids)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
        find_adapter_head(peft_model).active_layer.experts.mul_(2)
        assert not torch.allclose(compiled(input_ids=ids, use_cache=False).logits, expected)


def test_adapter_changed_in_mid_generation_needs_no_new_cache():
    peft_model = with_adapter(tiny_model())
    peft_model.add_adapter("other", MoEBiasConfig(experts="free", num_experts=8))
    randomise(find_adapter_head(peft_model).moe_bias_layers["other"], seed=7)
    first, second = token_ids(length=6), token_ids(length=3, seed=9)
    cache = DynamicCache(config=peft_model.config)
    decode(peft_model, first, cache)
    peft_model.set_adapter("other")
    continued = decode(peft_model, second, cache)
    recomputed = DynamicCache(config=peft_model.config)
    decode(peft_model, first, recomputed)
    assert torch.equal(continued, decode(peft_model, second, recomputed))
    for kept, new in zip(cache.layers, recomputed.layers, strict=True):
        assert torch.equal(kept.keys, new.keys)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [None, SUPPORT], ids=["whole", "support"])
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi"])
def test_training_moves_every_trainable_tensor_and_no_base_weight(name, support):
    model, ids = tiny_model(name), token_ids()
    before = weights_hash(model)
    peft_model = get_peft_model(model, MoEBiasConfig(experts="free", num_experts=4, support=support)).train()
    initial = {key: value.clone() for key, value in peft_model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW([value for value in peft_model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = peft_model(input_ids=ids, labels=ids).loss
        (loss + get_load_balance_loss(peft_model)).backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert len(initial) == 4
    for key, value in peft_model.named_parameters():
        if value.requires_grad:
            assert not torch.equal(value, initial[key]), key
    assert weights_hash(peft_model) == before
    assert torch.equal(logits_of(peft_model.unload()), logits_of(tiny_model(name)))


def test_gradients_are_those_of_the_plain_formula():
    """Through the whole head, against the bias added to full logits by hand, in float64."""
    ids = token_ids()
    model = tiny_model("gemma2").double()
    peft_model = get_peft_model(model, MoEBiasConfig(experts="free", num_experts=4, support=SUPPORT, strength=0.7))
    head = find_adapter_head(peft_model)
    head.double()
    randomise(head.active_layer, scale=0.1)
    layer = head.active_layer
    logits = peft_model(input_ids=ids).logits
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad((logits * weights).sum(), list(layer.parameters()))

    with torch.no_grad(), peft_model.disable_adapter():
        output = peft_model(input_ids=ids, output_hidden_states=True)
    log_prob = output.logits.log_softmax(-1)
    bias = layer(output.hidden_states[-1], -(log_prob.exp() * log_prob).sum(-1)).bias
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    bias = layer(output.hidden_states[-1], -(log_prob.exp() * log_prob).sum(-1)).bias
    plain = output.logits + 0.7 * layer.on_vocabulary(bias)
    expected = torch.autograd.grad((plain * weights).sum(), list(layer.parameters()))
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


def test_load_balance_loss_needs_a_forward_with_gradients():
    peft_model = with_adapter(tiny_model())
    logits_of(peft_model)
    with pytest.raises(ValueError, match="training mode"):
        get_load_balance_loss(peft_model)


# --- merging --------------------------------------------------------------------------------------


STATIC = {"num_experts": 1, "top_k": 1, "entropy_gate": False}
STATIC_KINDS = [
    {"experts": "free"},
    {"experts": "directions"},
    {"experts": "directions", "free_entries": True},
    {"experts": "directions", "reach": "vocabulary"},
]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "cohere", "granite", "phi"])
@pytest.mark.parametrize("support", [None, SUPPORT], ids=["whole", "support"])
@pytest.mark.parametrize("kind", STATIC_KINDS, ids=["free", "directions", "both", "reach"])
@pytest.mark.filterwarnings("ignore:the output embedding had no bias")
def test_static_adapter_merges_into_the_head_bias(name, support, kind):
    model, ids = tiny_model(name), token_ids()
    base, before = logits_of(model), weights_hash(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    peft_model = with_adapter(model, support=support, strength=0.7, **STATIC, **kind)
    expected = logits_of(peft_model)
    peft_model.merge_adapter()
    torch.testing.assert_close(logits_of(peft_model), expected, rtol=1e-5, atol=1e-5)
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(peft_model), base)
    peft_model.merge_adapter()
    peft_model.unmerge_adapter()
    assert weights_hash(peft_model) == before
    assert torch.equal(logits_of(peft_model), expected)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


@pytest.mark.filterwarnings("ignore:the output embedding had no bias")
def test_two_static_adapters_merge_and_come_out_again():
    model = tiny_model()
    base = logits_of(model)
    peft_model = with_adapter(model, **STATIC)
    peft_model.add_adapter("other", MoEBiasConfig(experts="free", **STATIC))
    randomise(find_adapter_head(peft_model).moe_bias_layers["other"], seed=5)
    moves = sum(layer.experts[0] for layer in find_adapter_head(peft_model).moe_bias_layers.values())
    peft_model.merge_adapter(adapter_names=["default", "other"])
    torch.testing.assert_close(logits_of(peft_model), base + moves.detach(), rtol=1e-5, atol=1e-5)
    peft_model.unmerge_adapter()
    assert model.lm_head.base_layer.bias is None


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the output embedding had no bias")
def test_one_direction_merges_as_its_product_with_the_output_embedding():
    model = tiny_model("phi")
    own, weight = model.lm_head.bias.clone(), model.lm_head.weight
    peft_model = with_adapter(model, experts="directions", **STATIC)
    direction_D = find_adapter_head(peft_model).active_layer.directions[0].clone()
    torch.testing.assert_close(peft_model.merge_and_unload().lm_head.bias, own + weight @ direction_D)


def test_merging_warns_where_the_checkpoint_could_not_hold_the_bias():
    peft_model = with_adapter(tiny_model(), **STATIC)
    with pytest.warns(UserWarning, match="save the adapter, not the merged model"):
        peft_model.merge_and_unload()


@pytest.mark.parametrize(
    ("name", "dtype", "settings", "reason"),
    [
        ("llama", torch.float32, {}, "with 4 experts its bias depends on the hidden state"),
        ("llama", torch.float32, {"num_experts": 1, "top_k": 1}, "with the entropy gate its bias depends on the base"),
        ("llama", torch.float32, {"experts": "linear", **STATIC}, "with linear experts its bias depends on the hidden"),
        ("gemma2", torch.float32, STATIC, "the model soft-caps its logits at 2,"),
        ("gemma2", torch.float32, {"experts": "directions", **STATIC}, "the model soft-caps its logits at 2,"),
        ("llama", torch.bfloat16, STATIC, "bfloat16 cannot hold its bias exactly"),
    ],
)
def test_merging_that_would_not_be_exact_is_refused_with_the_reason(name, dtype, settings, reason):
    peft_model = with_adapter(tiny_model(name).to(dtype), **settings)
    expected = logits_of(peft_model)
    with pytest.raises(ValueError, match=f"adapter 'default' cannot be merged: .*{reason}"):
        peft_model.merge_and_unload()
    assert torch.equal(logits_of(peft_model), expected)
