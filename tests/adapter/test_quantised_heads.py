"""Heads that bitsandbytes and torchao have quantised, as those libraries compute with them on a CPU."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from helpers.models import randomise, tiny_model, token_ids
from moe_bias import MoEBiasConfig, apply_moe_bias, find_adapter_head, get_moe_bias_layer
from moe_bias.backbone import Head, HeadTransform, OutputRows, find_head
from moe_bias.chunks import AtOnce
from moe_bias.config import LayerConfig, SFTConfig
from moe_bias.evaluation.likelihood import token_nll
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.features.fingerprint import head_hash, model_facts
from moe_bias.mistakes import UserError
from moe_bias.support import full_log_prob
from moe_bias.tasks.conversations import Example
from moe_bias.training.sft import fit

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs uv run --group quantised")
quantization = pytest.importorskip("torchao.quantization", reason="needs uv run --group quantised")

WIDTH, VOCABULARY = 64, 128
"""Multiples of the blocks that these libraries pack by."""
SUPPORT = list(range(2, 60))


def bnb_int8(linear: nn.Linear) -> nn.Module:
    packed = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu").requires_grad_(False).eval()


def bnb_nf4(linear: nn.Linear) -> nn.Module:
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu").requires_grad_(False).eval()


def torchao_by(config_name: str):
    def quantised(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(copy.deepcopy(linear))
        quantization.quantize_(holder, getattr(quantization, config_name)())
        return holder[0]

    return quantised


QUANTISED = {
    "bitsandbytes-int8": bnb_int8,
    "bitsandbytes-nf4": bnb_nf4,
    "torchao-int8": torchao_by("Int8WeightOnlyConfig"),
    "torchao-intx": torchao_by("IntxWeightOnlyConfig"),
    "torchao-float8": torchao_by("Float8WeightOnlyConfig"),
    "torchao-int8-activations": torchao_by("Int8DynamicActivationInt8WeightConfig"),
}
KINDS = pytest.mark.parametrize("kind", QUANTISED)


def linear_of(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(False)


def quantised_model(kind: str):
    model = tiny_model("llama", vocab_size=VOCABULARY, hidden_size=WIDTH)
    model.set_output_embeddings(QUANTISED[kind](model.lm_head))
    return model


def some_hidden(count: int = 9) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


@KINDS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [2**24, 4 * VOCABULARY])
def test_some_logits_are_those_of_the_modules_own_product(kind, bias, at_once, monkeypatch):
    monkeypatch.setattr("moe_bias.backbone.PACKED_LOGITS", AtOnce(at_once, at_once))
    head = Head(QUANTISED[kind](linear_of(bias)), HeadTransform(scale=0.5, cap=3.0))
    assert head.rows.are_packed
    hidden_TD, token_T = some_hidden(), torch.arange(9) * 11
    logits_TV = head.logits(hidden_TD)
    assert logits_TV.std() > 0.1
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # rounding may depend on the rows that are multiplied together
    columns_TM = head.columns(torch.tensor([40, 3, 127]))(hidden_TD)
    torch.testing.assert_close(columns_TM, logits_TV[:, [40, 3, 127]], **tolerance)
    torch.testing.assert_close(head.token_logits(hidden_TD, token_T), logits_TV[torch.arange(9), token_T], **tolerance)
    assert head.columns(torch.tensor([40, 3]))(hidden_TD.view(3, 3, WIDTH)).shape == (3, 3, 2)
    assert head.columns(torch.tensor([40, 3]))(hidden_TD[:0]).shape == (0, 2)


@KINDS
def test_rows_are_the_weight_that_the_library_unpacks(kind):
    packed = QUANTISED[kind](linear_of())
    if kind == "bitsandbytes-nf4":
        unpacked = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    elif kind == "bitsandbytes-int8":
        unpacked = packed.weight.CB.float() * packed.weight.SCB[:, None] / 127
    else:
        unpacked = packed.weight.dequantize()
    # Products of bitsandbytes are rounded to half precision, those of four bits on a CPU to bfloat16.
    torch.testing.assert_close(OutputRows(packed)(None), unpacked.float(), rtol=1e-2, atol=1e-3)
    assert (unpacked - linear_of().weight).abs().max() > 1e-5


@KINDS
@torch.no_grad()
def test_final_logits_move_by_exactly_the_bias(kind):
    model, ids = quantised_model(kind), token_ids()
    base = model(input_ids=ids, output_hidden_states=True)
    adapted = get_peft_model(model, MoEBiasConfig(support=SUPPORT, expert_rank=2))
    layer = find_adapter_head(adapted).active_layer
    randomise(layer, scale=0.1)
    moved = adapted(input_ids=ids).logits - base.logits
    assert moved.abs().max() > 0.05
    alone = quantised_model(kind)
    twin = find_head(alone)[1].layer(layer.config)
    twin.load_state_dict(layer.state_dict())
    entropy = torch.distributions.Categorical(logits=base.logits).entropy()
    expected = twin.on_vocabulary(twin(base.hidden_states[-1], entropy).bias)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
    get_moe_bias_layer(alone, SUPPORT)
    assert torch.equal(apply_moe_bias(base, alone), base.logits)


@KINDS
def test_training_on_features_lowers_the_loss_of_the_model_itself(kind):
    """What a store and the support's columns tell of the loss is what the full softmax of the module tells."""
    model = quantised_model(kind)
    _, head = find_head(model)
    ids = token_ids(8, 12).tolist()
    examples = [Example(row[:4], [7 if token % 2 else 30 for token in row[4:]]) for row in ids]
    features = with_scalars(head, run_backbone(model, examples, 8, "test"), SUPPORT, "test")
    torch.manual_seed(0)
    layer = head.layer(LayerConfig(support=tuple(SUPPORT), expert_rank=2))
    report = fit(layer, features, head, SFTConfig(epochs=20), "test")
    assert report.steps > 10
    nll_T, base_T = token_nll(layer, features, head), token_nll(None, features, head)
    assert nll_T.mean() < base_T.mean() - 0.5
    logits_TV = head.logits(features.hidden)
    with torch.no_grad():
        move_TV = layer.on_vocabulary(layer(features.hidden, features.entropy).bias)
    expected = -full_log_prob(logits_TV.double(), move_TV.double(), torch.arange(VOCABULARY), features.token)
    torch.testing.assert_close(nll_T.double(), expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_a_quantised_head_has_a_hash_of_its_own(kind):
    same, other = QUANTISED[kind](linear_of()), linear_of()
    other.weight[3, 5] = 2 * other.weight.abs().max()
    before = head_hash(same)
    assert before == head_hash(QUANTISED[kind](linear_of())) != head_hash(QUANTISED[kind](other))
    if kind != "bitsandbytes-nf4":  # which a first product on a CPU packs otherwise
        same(some_hidden())
        assert head_hash(same) == before


def test_facts_of_a_model_that_is_quantised_as_a_whole():
    class Tokenizer:
        chat_template = None

        def get_vocab(self):
            return {}

    def facts(model):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model_facts(model, find_head(model)[1], Tokenizer())

    first, other = tiny_model("llama", vocab_size=VOCABULARY, hidden_size=WIDTH), tiny_model("llama", hidden_size=WIDTH)
    changed = copy.deepcopy(first)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(2)
    found = facts(first)
    assert (found.hidden_size, found.vocab_size, found.compute_dtype) == (WIDTH, VOCABULARY, "float32")
    assert len({found.backbone, facts(changed).backbone, facts(other).backbone}) == 3


@KINDS
def test_merging_into_a_quantised_head_is_refused_by_name(kind):
    model = get_peft_model(
        quantised_model(kind), MoEBiasConfig(num_experts=1, top_k=1, experts="free", entropy_gate=False)
    )
    find_adapter_head(model).active_layer.experts.data.fill_(1.0)
    with pytest.raises(UserError, match=r"is a Linear\w* with a weight of type \w+, no plain linear"):
        model.merge_and_unload()


def test_a_head_without_parameters_tells_where_it_computes():
    class Packed(nn.Module):
        in_features, out_features = 2, 3

        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int8))

        def forward(self, hidden):
            return hidden @ self.packed.float().T

    head = Head(Packed(), HeadTransform())
    assert (head.device, head.dtype) == (torch.device("cpu"), torch.float32)
    assert head.columns(torch.tensor([2, 0]))(torch.tensor([[1.0, 10.0]])).tolist() == [[65.0, 21.0]]
    assert head.token_logits(torch.tensor([[1.0, 10.0]]), torch.tensor([1])).tolist() == [43.0]
