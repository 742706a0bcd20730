"""Adapter files that no training made: each is refused in a sentence, however it is loaded; and what overflows."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.models import HIDDEN, VOCABULARY, randomise, tiny_model, token_ids
from moe_bias import MoEBiasConfig, apply_moe_bias, find_adapter_head, load_moe_bias_layer
from moe_bias.adapter.saved import load_layer, read_saved
from moe_bias.backbone import HeadTransform, find_head
from moe_bias.config import LayerConfig
from moe_bias.layer import LARGEST_INPUT, MoEBiasLayer
from moe_bias.layer import module as layer_module
from moe_bias.mistakes import UserError
from moe_bias.serving.rows import AskedAdapter, Tenant, move_rows, rows_by_tenant
from moe_bias.serving.versions import read_version

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SUPPORT = [3, 5, 8, 40]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model = get_peft_model(tiny_model(), MoEBiasConfig(support=SUPPORT, expert_rank=2, free_entries=True))
    randomise(find_adapter_head(model).active_layer)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def ways_of_loading(folder):
    rows = find_head(tiny_model())[1].rows
    return {
        "PEFT": lambda: PeftModel.from_pretrained(tiny_model(), folder),
        "by hand": lambda: load_moe_bias_layer(tiny_model(), folder),
        "at a head": lambda: load_layer(folder, find_head(tiny_model())[1]),
        "without a model": lambda: read_saved(str(folder)),
        "to be served": lambda: read_version(folder, HIDDEN, VOCABULARY, rows),
    }


def assert_refused(folder, sentence):
    for use in ways_of_loading(folder).values():
        with pytest.raises(UserError, match=sentence) as refusal:
            use()
        assert "\n" not in str(refusal.value)


def change(folder, name, to):
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key] = to(tensors[key])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_the_file_as_it_was_saved_loads_in_all_ways(folder):
    for use in ways_of_loading(folder).values():
        use()


def one(value):
    def to(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return to


@pytest.mark.parametrize(
    ("name", "to", "sentence"),
    [
        ("hidden_scale", torch.Tensor.int, "'hidden_scale' has type int32; it must be a float of 16 bits or more"),
        ("router.weight", torch.Tensor.cfloat, "'router.weight' has type complex64; it must be a float"),
        ("directions", torch.Tensor.bool, "'directions' has type bool; it must be a float"),
        ("writes", torch.Tensor.char, "'writes' has type int8; it must be a float"),
        ("reads", lambda tensor: tensor.to(torch.float8_e4m3fn), "'reads' has type float8_e4m3fn; it must be a float"),
        ("experts", one(torch.nan), "'experts' holds NaN or infinite values"),
        ("hidden_mean", one(-torch.inf), "'hidden_mean' holds NaN or infinite values"),
        ("hidden_scale", one(0.0), "'hidden_scale', which hidden states are divided by, is not above 0 throughout"),
        ("hidden_scale", one(-1.0), "'hidden_scale', which hidden states are divided by, is not above 0 throughout"),
        ("hidden_scale", one(1e-40), "its hidden_scale so small, that its router could overflow"),
        ("router.weight", one(1e38), "that its router could overflow"),
        ("router.weight", lambda tensor: tensor * 1e-39, "'router.weight' holds numbers below 1e-37 alone"),
        ("hidden_mean", one(3e38), "that its router could overflow"),
        ("directions", one(1e35), "that its bias could overflow"),
        ("experts", one(2e38), "that its bias could overflow"),
        ("writes", one(1e32), "that its bias could overflow"),
        ("reads", one(1e33), "that its bias could overflow"),
    ],
)
def test_tensors_that_no_layer_has(folder, name, to, sentence):
    change(folder, name, to)
    assert_refused(folder, sentence)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_of_sixteen_bits_or_more_is_read(folder, dtype):
    for name in ("router.weight", "directions", "writes", "reads", "experts", "hidden_scale", "hidden_mean"):
        change(folder, name, lambda tensor: tensor.to(dtype))
    for use in ways_of_loading(folder).values():
        use()


def test_a_router_of_zeros_is_no_damage(folder):
    change(folder, "router.weight", torch.zeros_like)
    load_moe_bias_layer(tiny_model(), folder)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"num_experts": 4', '"num_experts": 4, "num_experts": 4', "is not JSON: key 'num_experts' stands twice"),
        ('"strength": 1.0', '"strength": NaN', "strength is nan: input should be a finite number"),
        (
            '"fork_coverage": null',
            '"fork_coverage": 1.5',
            r"fork_coverage is 1\.5: input should be less than or equal to 1",
        ),
        ('"fork_coverage": null', '"fork_coverage": "x"', "fork_coverage is 'x': input should be a valid number"),
    ],
)
def test_configs_that_no_training_made(folder, old, new, sentence):
    text = (folder / CONFIG).read_text()
    assert old in text
    (folder / CONFIG).write_text(text.replace(old, new))
    assert_refused(folder, sentence)


@pytest.mark.parametrize("sample", [[], {}, "x", [True], ["1"], [None], [1e400], 3])
def test_a_sample_that_tells_nothing_is_refused(folder, sample):
    """A comparison with NaN or infinity would find any other model the same."""
    config = json.loads((folder / CONFIG).read_text())
    config["embedding_sample"] = sample
    (folder / CONFIG).write_text(json.dumps(config).replace("Infinity", "1e400"))
    assert_refused(folder, "embedding_sample")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b'\x08\0\0\0\0\0\0\0{"a": 1'])
def test_weights_that_are_no_safetensors_file(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    for way, use in ways_of_loading(folder).items():
        if way != "PEFT":  # which reads the file before any of this package's code
            with pytest.raises(UserError, match=f"{WEIGHTS}' cannot be read: "):
                use()


def test_a_config_that_is_no_object(folder):
    (folder / CONFIG).write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        load_moe_bias_layer(tiny_model(), folder)
    with pytest.raises(UserError, match="holds no JSON object"):
        load_layer(folder, find_head(tiny_model())[1])


# --- the layer ------------------------------------------------------------------------------------


def layer_of(**choices) -> MoEBiasLayer:
    torch.manual_seed(0)
    head = find_head(tiny_model())[1]
    return head.layer(LayerConfig(support=tuple(SUPPORT), **choices))


def adverse_hidden() -> torch.Tensor:
    hidden_TD = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(2))
    hidden_TD[1] = LARGEST_INPUT
    hidden_TD[2] = -LARGEST_INPUT
    hidden_TD[3] = LARGEST_INPUT * hidden_TD[3].sign()
    hidden_TD[4] = 0
    hidden_TD[5] *= 1e-30
    return hidden_TD


@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_finite_hidden_states_have_a_finite_bias_or_a_refusal(seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = (
        {"experts": "free"},
        {"experts": "directions"},
        {"expert_rank": 2},
        {"expert_rank": 2, "free_entries": True},
    )
    layer = layer_of(**kinds[seed % 4])
    randomise(layer, seed)
    for tensor in layer.state_dict().values():  # up to 38 orders of magnitude away, at some places
        power = torch.randint(-38, 38, tensor.shape, generator=generator).float()
        far = torch.rand(tensor.shape, generator=generator) < 0.05 * (seed % 5)
        tensor.mul_(torch.where(far, 10.0**power, torch.ones_like(power)).clamp(max=1e37))
    try:
        output = layer(adverse_hidden(), torch.rand(6))
    except UserError:
        assert seed % 5
    else:
        assert output.bias.isfinite().all()
        assert output.routing.gates.isfinite().all()


def test_overflow_is_looked_for_once_and_again_after_a_change(monkeypatch):
    looks = []
    look = layer_module.check_layer_values
    monkeypatch.setattr(layer_module, "check_layer_values", lambda *args: looks.append(args) or look(*args))
    layer, hidden_TD = layer_of(), adverse_hidden()
    randomise(layer)
    with torch.no_grad():
        for _ in range(3):
            layer(hidden_TD, torch.rand(6))
    assert len(looks) == 1
    for _ in range(3):
        layer(hidden_TD, torch.rand(6)).bias.sum().backward()  # training does not wait for it
    assert len(looks) == 1
    layer.requires_grad_(False)
    layer.hidden_scale[0] = 0
    with pytest.raises(UserError, match="'hidden_scale', which hidden states are divided by, is not above 0"):
        layer(hidden_TD, torch.rand(6))
    layer.hidden_scale[0] = 1
    layer.strength = 1e37
    with pytest.raises(UserError, match="that its bias could overflow"):
        layer(hidden_TD, torch.rand(6))
    assert len(looks) == 3


def test_a_layer_that_was_cast_to_half_precision_is_told_of_a_scale_that_is_lost():
    layer = layer_of().requires_grad_(False)
    layer.calibrate(torch.cat([torch.zeros(3, HIDDEN), 1e-9 * torch.ones(1, HIDDEN)]))
    layer(adverse_hidden(), torch.rand(6))
    layer.hidden_scale.mul_(1e-3)
    with pytest.raises(UserError, match="is not above 0 throughout"):
        layer.half()(adverse_hidden(), torch.rand(6))


@torch.no_grad()
def test_half_precision_logits_stay_finite_under_a_bias_beyond_its_range():
    ids = token_ids()
    model = tiny_model("phi").half()
    model.lm_head.bias[90:] = -torch.inf
    adapted = get_peft_model(model, MoEBiasConfig(experts="free", entropy_gate=False))
    layer = find_adapter_head(adapted).active_layer
    layer.experts[:, 7], layer.experts[:, 8] = 1e6, -1e6
    logits = adapted(input_ids=ids).logits
    assert logits.dtype == torch.float16
    assert (logits[..., 7] == LARGEST_INPUT).all()
    assert (logits[..., 8] == -LARGEST_INPUT).all()
    assert logits[..., :90].isfinite().all()
    assert logits[..., 90:].isneginf().all()

    hidden, entropy = torch.randn(2, HIDDEN), torch.zeros(2)
    served = torch.zeros(2, VOCABULARY, dtype=torch.float16)
    groups = rows_by_tenant({0: Tenant((AskedAdapter("version", 1.0, layer),))}, torch.device("cpu"))
    move_rows(served, hidden, groups, HeadTransform(), entropy)
    assert served[0, 7] == LARGEST_INPUT
    assert not served[1].any()


@torch.no_grad()
def test_half_precision_logits_of_the_four_line_use_stay_finite(folder):
    model = tiny_model().half()
    layer = load_moe_bias_layer(model, folder)
    layer.experts.fill_(6e4)
    layer.strength = 4.0
    output = model(input_ids=token_ids(), output_hidden_states=True)
    assert apply_moe_bias(output, model).isfinite().all()
