"""TRL's trainers that take the model's own logits train an adapter as they would the bias that it is.

A static adapter (one free expert, no gate) is exactly a bias of the output embedding. So the same trainer on a plain
model whose head has that bias, and nothing else to train, must make the same steps; a trainer that lost the adapter's
logits would not.
"""

import importlib

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from helpers.models import VOCABULARY, tiny_model, word_tokenizer
from moe_bias import MoEBiasConfig, find_adapter_head, shift_hidden_states

trl = pytest.importorskip("trl")
STEPS = 3
PROMPTS = ["w5 w6", "w7 w8 w9", "w10", "w11 w12"]
CHOSEN, REJECTED, REFERENCE = "w13 w14", "w15 w16 w17", "w18 w14"
TRAINERS = {
    "orpo": ("ORPO", {}),
    "cpo": ("CPO", {}),
    "tpo": ("TPO", {}),
    "online_dpo": ("OnlineDPO", {"max_new_tokens": 4}),
}


def chat_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    return tokenizer


def biased() -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))


def with_adapter():
    config = MoEBiasConfig(experts="free", num_experts=1, top_k=1, entropy_gate=False)
    model = get_peft_model(tiny_model(), config)
    layer = find_adapter_head(model).active_layer
    layer.experts.data.copy_(biased()[None])
    return model, layer.experts


def with_plain_bias():
    model = tiny_model().requires_grad_(False)
    model.lm_head.bias = torch.nn.Parameter(biased())
    return model, model.lm_head.bias


def high_words(completions, **_):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(sum(int(word[1:]) for word in text.split() if word[1:].isdigit())) for text in texts]


def arguments_of(config, folder, **choices):
    """A run on a CPU of a few steps, each logged."""
    return config(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=0.1,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=3,
        **choices,
    )


def logged(trainer, key):
    """The values of one metric, step by step."""
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(name, made, folder):
    """The bias after a few steps, and the losses on the way."""
    model, bias = made()
    prefix, choices = TRAINERS[name]
    package = importlib.import_module(f"trl.experimental.{name}")
    columns = {"prompt": PROMPTS, "chosen": [CHOSEN] * 4, "rejected": [REJECTED] * 4, "reference": [REFERENCE] * 4}
    more = {}
    if name == "online_dpo":
        columns, more = {"prompt": PROMPTS}, {"reward_funcs": high_words, "ref_model": tiny_model()}
    trainer = getattr(package, f"{prefix}Trainer")(
        model,
        args=arguments_of(getattr(package, f"{prefix}Config"), folder, **choices),
        train_dataset=Dataset.from_dict(columns),
        processing_class=chat_tokenizer(),
        **more,
    )
    losses = logged(trainer, "loss")
    return bias.detach().flatten().clone(), losses


@pytest.mark.parametrize("name", TRAINERS)
def test_the_adapter_is_trained_as_the_bias_that_it_is(name, tmp_path):
    adapted, adapted_losses = trained(name, with_adapter, tmp_path / "adapted")
    plain, plain_losses = trained(name, with_plain_bias, tmp_path / "plain")
    assert len(adapted_losses) == STEPS
    assert adapted_losses == pytest.approx(plain_losses, abs=2e-4)
    assert (adapted - biased()).abs().max() > 0.01
    torch.testing.assert_close(adapted, plain, rtol=1e-3, atol=1e-3)


PAIRS = {"prompt": PROMPTS, "chosen": [CHOSEN] * 4, "rejected": [REJECTED] * 4}
LABELLED = {"prompt": PROMPTS, "completion": [CHOSEN, REJECTED] * 2, "label": [True, False] * 2}
GROUPS = {"max_completion_length": 4, "num_generations": 2}
FUSED = {
    "SFT": ({"input_ids": [list(range(3, 12))] * 4}, "loss", {}),
    "DPO": (PAIRS, "loss", {}),
    "KTO": (LABELLED, "loss", {}),
    "GRPO": ({"prompt": PROMPTS}, "entropy", GROUPS),
    "RLOO": ({"prompt": PROMPTS}, "entropy", {**GROUPS, "beta": 0.0}),
}


def fused_trainer(name, model, folder):
    columns, _, choices = FUSED[name]
    more = {"ref_model": tiny_model()} if name in ("DPO", "KTO") else {}
    if name in ("GRPO", "RLOO"):
        more = {"reward_funcs": high_words}
    args = arguments_of(getattr(trl, f"{name}Config"), folder, **choices)
    data = Dataset.from_dict(columns)
    trainer = getattr(trl, f"{name}Trainer")
    return trainer(model, args=args, train_dataset=data, processing_class=chat_tokenizer(), **more)


@pytest.mark.parametrize("name", FUSED)
def test_fused_heads_train_the_adapter_as_a_shift_alone(name, tmp_path):
    """One direction c on the whole vocabulary is the bias W c: the first step sees the same model."""
    config = MoEBiasConfig(experts="directions", num_experts=1, top_k=1, entropy_gate=False)
    model = get_peft_model(tiny_model(), config)
    layer = find_adapter_head(model).active_layer
    layer.directions.data.normal_(generator=torch.Generator().manual_seed(1))
    before = layer.directions.detach().clone()
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        fused_trainer(name, model, tmp_path / "refused")
    plain = tiny_model()
    plain.lm_head.bias = torch.nn.Parameter((before @ plain.lm_head.weight.detach().T)[0])
    metric = FUSED[name][1]
    with shift_hidden_states(model):
        found = logged(fused_trainer(name, model.get_base_model(), tmp_path / "shifted"), metric)
    assert found[0] == pytest.approx(logged(fused_trainer(name, plain, tmp_path / "plain"), metric)[0], abs=2e-4)
    assert (layer.directions - before).abs().max() > 0.01
