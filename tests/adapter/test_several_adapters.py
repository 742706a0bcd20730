"""Several adapters in one PEFT model: one for each row of a batch, or all on every row, whose biases add."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from helpers.models import randomise, tiny_model, token_ids
from moe_bias import MoEBiasConfig, find_adapter_head, get_load_balance_loss, shift_hidden_states
from moe_bias.backbone import HeadTransform
from moe_bias.combined import summed_logits
from moe_bias.layer import entropy_from_logits
from moe_bias.mistakes import UserError

CONFIGS = {
    "linear": MoEBiasConfig(num_experts=3, expert_rank=2, support=[2, 5, 9, 40, 96], strength=0.7),
    "free": MoEBiasConfig(experts="free", num_experts=2, top_k=1),
    "static": MoEBiasConfig(experts="directions", num_experts=1, top_k=1, entropy_gate=False, support=[3, 5, 8]),
}
NAMES = ("__base__", *CONFIGS)


def adapted(architecture="llama", dtype=torch.float64):
    """A tiny model with all of them."""
    model = get_peft_model(tiny_model(architecture), CONFIGS["linear"], adapter_name="linear")
    for name in ("free", "static"):
        model.add_adapter(name, CONFIGS[name])
    head = find_adapter_head(model)
    for seed, name in enumerate(CONFIGS):
        randomise(head.moe_bias_layers[name], seed=seed + 1)
    return model.to(dtype).eval()


@torch.no_grad()
def alone(model, name, **inputs):
    """Logits under one adapter, or of the plain model."""
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "gpt2"])
def test_each_row_has_the_adapter_of_its_name(architecture):
    model, names = adapted(architecture), ["free", "__base__", "linear", "static", "linear", "__base__"]
    ids = token_ids(batch=6)
    expected = torch.stack([alone(model, name, input_ids=ids)[row] for row, name in enumerate(names)])
    model.set_adapter("static")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, expected)
        torch.testing.assert_close(model(input_ids=ids).logits, alone(model, "static", input_ids=ids))
        with model.disable_adapter():
            found = model(input_ids=ids, adapter_names=names).logits
            torch.testing.assert_close(found, model(input_ids=ids).logits)
    assert len({tuple(row.flatten().tolist()) for row in expected[:, 0, :3]}) > 3


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=7), kept=st.integers(1, 4), seed=st.integers(0, 9))
def test_any_rows_and_any_positions_kept(names, kept, seed):
    model, ids = adapted(), token_ids(batch=len(names), seed=seed)
    given_ids = {"input_ids": ids, "logits_to_keep": kept}
    expected = torch.stack([alone(model, name, **given_ids)[row] for row, name in enumerate(names)])
    with torch.no_grad():
        torch.testing.assert_close(model(**given_ids, adapter_names=names).logits, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_an_adapter_a_row(beams):
    model, ids = adapted(dtype=torch.float32), token_ids(batch=4)
    names = ["linear", "__base__", "free", "static"]
    choices = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=ids, adapter_names=names, **choices)
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=one, **choices)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=one, **choices)
        assert found[row].tolist() == expected[0].tolist(), name
    assert find_adapter_head(model).rows is None


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("names", [["linear", "free"], ["static", "linear", "free"], ["free"]])
def test_biases_of_active_adapters_add(architecture, names):
    model, ids = adapted(architecture), token_ids()
    head = find_adapter_head(model)
    base = alone(model, "__base__", input_ids=ids)
    model.base_model.set_adapter(names)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        seen = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(input_ids=ids)
        hook.remove()
        parts = [(head.moe_bias_layers[name], CONFIGS[name].strength) for name in names]
        transform = HeadTransform(cap=head.transform.cap)
        expected = summed_logits(parts, transform, seen[0], entropy_from_logits(base), base)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)  # a scale is measured in float32
    assert not torch.equal(found, base)


def test_a_sum_is_trained_and_taken_apart_again():
    model, ids = adapted().train(), token_ids()
    model.base_model.set_adapter(["linear", "static"])
    model(input_ids=ids, labels=ids).loss.backward()
    head = find_adapter_head(model)
    trained = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in trained if name.startswith("moe_bias_layers")} == {"linear", "static"}
    with pytest.raises(UserError, match="no call yet whose load"):
        get_load_balance_loss(model)
    with pytest.raises(UserError, match=r"the adapters \['linear', 'static'\] are active together"):
        shift_hidden_states(model)
    model.set_adapter("linear")
    model(input_ids=ids, labels=ids)
    assert get_load_balance_loss(model) > 0


def test_what_cannot_be_is_refused_by_name():
    model, ids = adapted(), token_ids()
    for names, sentence in [
        ("linear", "`adapter_names` is 'linear'; give a list"),
        (["linear", 3], "give a list of names"),
        (
            ["linear", "absent"],
            "`adapter_names` has 'absent', and the model has 'linear', 'free', 'static', '__base__'",
        ),
        (["linear"], "`adapter_names` has 1 names, and the batch 2 rows"),
    ]:
        with pytest.raises(UserError, match=sentence):
            model(input_ids=ids, adapter_names=names)
    assert find_adapter_head(model).rows is None
    with pytest.raises(UserError, match="`adapter_names` is for inference"):
        model.train()(input_ids=ids, adapter_names=["linear", "free"])
