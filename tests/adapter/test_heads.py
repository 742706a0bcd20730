import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from helpers.models import ARCHITECTURES, VOCABULARY, randomise, tiny_model, token_ids
from moe_bias import MoEBiasConfig, find_adapter_head
from moe_bias.backbone import HeadTransform, find_head, hidden_states
from moe_bias.layer import entropy_from_logits

SUPPORT = [3, 5, 8, 40, 96]
SUPPORTS = pytest.mark.parametrize("support", [None, SUPPORT], ids=["whole", "support"])


def adapted(model: PreTrainedModel, **settings):
    return get_peft_model(model, MoEBiasConfig(experts="free", num_experts=4, **settings))


@torch.no_grad()
def expected_move(model: PreTrainedModel, head, base_logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """s b on the vocabulary, straight from the layer's definition, less what a soft-cap cannot reach."""
    layer = head.active_layer
    bias = layer(hidden, entropy_from_logits(base_logits)).bias
    return head.transform.reachable(base_logits.float(), layer.on_vocabulary(layer.strength * bias))


@pytest.mark.parametrize("name", ARCHITECTURES)
@SUPPORTS
@torch.no_grad()
def test_final_logits_move_by_exactly_the_bias(name, support):
    model, ids = tiny_model(name), token_ids()
    base = model(input_ids=ids).logits
    hidden = hidden_states(model, ids, torch.ones_like(ids))
    peft_model = adapted(model, support=support, strength=0.7)
    head = find_adapter_head(peft_model)
    randomise(head.active_layer, scale=0.3)
    moved = peft_model(input_ids=ids).logits
    expected = expected_move(model, head, base, hidden)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(moved - base, expected, rtol=1e-4, atol=2e-5)
    if support is not None:
        off = [token for token in range(VOCABULARY) if token not in support]
        assert torch.equal(moved[..., off], base[..., off])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@SUPPORTS
@torch.no_grad()
def test_fresh_adapter_is_bit_identical(name, dtype, support):
    model, ids = tiny_model(name).to(dtype), token_ids()
    base = model(input_ids=ids).logits
    fresh = adapted(model, support=support)(input_ids=ids).logits
    assert fresh.dtype == base.dtype
    assert torch.equal(fresh, base)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_rounds_once(name, dtype):
    model, ids = tiny_model(name).to(dtype), token_ids()
    base = model(input_ids=ids).logits
    hidden = hidden_states(model, ids, torch.ones_like(ids))
    peft_model = adapted(model, support=SUPPORT)
    head = find_adapter_head(peft_model)
    randomise(head.active_layer)
    assert head.active_layer.experts.dtype == torch.float32
    expected = base.float() + expected_move(model, head, base, hidden)
    error = (peft_model(input_ids=ids).logits.float() - expected).abs()
    # One rounding of the sum; a soft-cap or scale after it rounds again, and a cap magnifies near its edge.
    steps = {"llama": 1, "cohere": 2, "gemma2": 16}[name]
    assert (error <= steps * torch.finfo(dtype).eps * expected.abs().clamp(min=1)).all()


def test_heads_have_the_bias_vectors_and_ties_that_the_table_promises():
    assert tiny_model("phi").lm_head.bias is not None
    for name, tied in [("llama", False), ("llama-tied", True), ("gemma2", True), ("gpt2", True)]:
        model = tiny_model(name)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("llama", HeadTransform()),
        ("gemma2", HeadTransform(1.0, 2.0)),
        ("cohere", HeadTransform(0.25)),
        ("granite", HeadTransform(0.25)),
    ],
)
def test_transform_after_the_head_is_measured(name, transform):
    _, head = find_head(tiny_model(name))
    assert head.transform.scale == pytest.approx(transform.scale, rel=1e-5)
    assert (head.transform.cap is None) == (transform.cap is None)
    if transform.cap is not None:
        assert head.transform.cap == pytest.approx(transform.cap, rel=1e-5)


@torch.no_grad()
def test_padded_vocabulary_is_sized_by_the_head():
    """A head with more rows than config.vocab_size, as padding to a multiple of 64 makes it."""
    model, ids = tiny_model("llama"), token_ids()
    model.lm_head = nn.Linear(model.config.hidden_size, 128, bias=False)
    peft_model = adapted(model)
    layer = find_adapter_head(peft_model).active_layer
    assert layer.experts.shape == (4, 128)
    randomise(layer)
    assert peft_model(input_ids=ids).logits.shape[-1] == 128


@torch.no_grad()
def test_padding_rows_of_minus_infinity_leave_everything_finite():
    """Some models mask the rows that pad the vocabulary by a head bias of -inf."""
    model, ids = tiny_model("phi"), token_ids()
    model.lm_head.bias[90:] = -torch.inf
    peft_model = adapted(model)
    randomise(find_adapter_head(peft_model).active_layer)
    logits = peft_model(input_ids=ids).logits
    assert torch.isfinite(logits[..., :90]).all()
    assert logits[..., 90:].isneginf().all()


def test_unknown_transform_after_the_head_is_refused_by_name():
    class SquaringForCausalLM(type(tiny_model("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.square()
            return output

    model = SquaringForCausalLM(tiny_model("llama").config)
    with pytest.raises(ValueError, match="SquaringForCausalLM changes its logits after the output embedding"):
        adapted(model)


def test_head_that_is_not_linear_is_refused_by_name():
    model = tiny_model("llama")
    model.lm_head = nn.Embedding(97, 16)
    with pytest.raises(ValueError, match="is a Embedding, not a linear layer"):
        adapted(model)


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        adapted(tiny_model("llama").model)


class PackedLinear(nn.Module):
    """A quantised head: int8 weights packed two by two, so that no shape tells its size."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().max() / 127
        packed = (linear.weight / scale).round().to(torch.int8).reshape(-1, 2, linear.in_features)
        self.register_buffer("qweight", packed)
        self.register_buffer("scale", scale)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.qweight.reshape(-1, self.in_features)[: self.out_features]
        return hidden @ (weight * self.scale).T


@torch.no_grad()
def test_quantised_head_is_sized_by_its_features():
    model, ids = tiny_model("llama", vocab_size=98), token_ids()
    model.set_output_embeddings(PackedLinear(model.lm_head))
    base = model(input_ids=ids).logits
    peft_model = adapted(model, support=SUPPORT)
    assert torch.equal(peft_model(input_ids=ids).logits, base)
    layer = find_adapter_head(peft_model).active_layer
    layer.experts.fill_(1.0)
    moved = peft_model(input_ids=ids).logits - base
    assert (moved[..., SUPPORT] > 0).all()
    assert layer.experts.dtype == torch.float32
