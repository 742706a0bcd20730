"""TRL's trainers of a MoE-Bias adapter: the steps of a loop by hand, the backbone run once a row, and all the rest."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

import moe_bias as mb
from helpers.models import VOCABULARY, tiny_model
from moe_bias import MoEBiasConfig, find_adapter_head
from moe_bias.functional import get_load_balance_loss
from moe_bias.mistakes import UserError

pytest.importorskip("trl")
import trl

from helpers.training_processes import run_two_of
from helpers.trl_training import CONFIG, PAIRS, TEXTS, chat_tokenizer, choices_of, sft, train_and_save
from moe_bias.trl import MoEBiasDPOTrainer, MoEBiasGRPOTrainer, MoEBiasSFTTrainer


class Batches(TrainerCallback):
    """Keeps what a trainer's model was called with."""

    def __init__(self, trainer):
        self.seen = []
        original = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            self.seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(layer, model, batches, rate=1e-2, accumulated=1):
    """The losses of AdamW on the model's own logits, on the same batches; `layer` is trained."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for start in range(0, len(batches), accumulated):
        total, group = 0.0, batches[start : start + accumulated]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
        for batch in group:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            scored = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
            loss = nll / count + get_load_balance_loss(model, scored) / len(group)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_twenty_steps_are_those_of_a_loop_by_hand(tmp_path, architecture, accumulated):
    model = tiny_model(architecture)
    trainer = sft(tmp_path, model, max_steps=20, gradient_accumulation_steps=accumulated)
    layer = find_adapter_head(trainer.model).active_layer
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    batches = Batches(trainer)
    trainer.train()
    expected = get_peft_model(tiny_model(architecture), CONFIG)
    other = find_adapter_head(expected).active_layer
    other.load_state_dict(start)
    losses = by_hand(other, expected.train(), batches.seen, accumulated=accumulated)
    torch.testing.assert_close(torch.tensor(losses_of(trainer)), torch.tensor(losses), atol=2e-4, rtol=0)  # 4 digits
    for name, value in other.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, atol=2e-5, rtol=2e-4)
    assert losses[-1] < losses[0]
    assert trainer.states.computed == len(TEXTS)


def test_the_backbone_is_run_once_a_row_also_in_evaluation(tmp_path):
    trainer = sft(
        tmp_path,
        max_steps=-1,
        num_train_epochs=4,
        eval_strategy="epoch",
        more={"eval_dataset": Dataset.from_list([*TEXTS[:3], {"prompt": "w50 w51", "completion": "w52"}])},
    )
    trainer.train()
    assert trainer.states.computed == len(TEXTS) + 1
    metrics = trainer.state.log_history
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= {name for entry in metrics for name in entry}


def test_the_support_and_the_normalisation_come_from_the_texts(tmp_path):
    trainer = sft(tmp_path, peft_config=None, more={"support_size": 20})
    layer = find_adapter_head(trainer.model).active_layer
    support = set(layer.support.tolist())
    assert len(support) == 20
    assert 2 in support  # which ends an answer
    assert trainer.model.peft_config["default"].support == layer.support.tolist()
    assert layer.hidden_mean.any()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    found = find_adapter_head(again).active_layer.state_dict()
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(found[name], value)
    text = torch.arange(5, 12)[None]
    torch.testing.assert_close(again.eval()(text).logits, trainer.model.eval()(text).logits)


def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path):
    whole = sft(tmp_path / "whole", max_steps=8)
    whole.train()
    first = sft(tmp_path / "parts", max_steps=8, save_strategy="steps", save_steps=4)
    first.train()
    second = sft(tmp_path / "parts", max_steps=8, save_strategy="steps", save_steps=4)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    expected = find_adapter_head(whole.model).active_layer.state_dict()
    for trainer in (first, second):
        found = find_adapter_head(trainer.model).active_layer.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = sft(
        tmp_path,
        max_steps=9,
        learning_rate=1.0,  # which makes it worse
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        more={"eval_dataset": Dataset.from_list([{"prompt": "w50 w51", "completion": "w52 w53"}])},
    )
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(evaluated, key=evaluated.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    found = dict(find_adapter_head(trainer.model).active_layer.named_parameters())
    for name, value in found.items():
        (key,) = [each for each in saved if each.endswith(f".{name}")]
        torch.testing.assert_close(value.detach(), saved[key])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], abs=1e-4)


def test_two_processes_make_the_steps_of_one_with_twice_the_accumulation(tmp_path):
    alone = MoEBiasConfig(num_experts=3, expert_rank=2, support=CONFIG.support, load_balance_weight=0.0)
    choices = {"peft_config": alone, "per_device_train_batch_size": 2, "max_steps": 6}
    run_two_of(train_and_save, tmp_path / "two", choices)
    train_and_save(tmp_path / "one", {**choices, "gradient_accumulation_steps": 2})
    one, two = (load_file(tmp_path / name / "saved" / "adapter_model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


def test_packed_texts_are_trained_on(tmp_path):
    trainer = sft(tmp_path, packing=True, packing_strategy="wrapped", max_length=8, completion_only_loss=False)
    batches = Batches(trainer)
    trainer.train()
    assert {batch["input_ids"].shape[1] for batch in batches.seen} == {8}
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def test_an_adapter_is_trained_on_where_it_stands(tmp_path):
    first = sft(tmp_path / "first")
    first.train()
    first.save_model(str(tmp_path / "saved"))
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", is_trainable=True)
    before = find_adapter_head(model).active_layer.hidden_mean.clone()
    second = sft(tmp_path / "second", model, peft_config=None)
    second.train()
    assert losses_of(second)[0] < losses_of(first)[0]
    assert torch.equal(find_adapter_head(second.model).active_layer.hidden_mean, before)


def test_preferences_are_learned_against_the_frozen_model(tmp_path):
    trainer = MoEBiasDPOTrainer(
        tiny_model(),
        args=choices_of(trl.DPOConfig, tmp_path, max_steps=12, learning_rate=3e-2, beta=0.5),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=chat_tokenizer(),
        peft_config=CONFIG,
    )
    assert trainer.ref_model is None
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    balance = find_adapter_head(trainer.model).active_layer.config.load_balance_weight
    assert history[0]["loss"] == pytest.approx(0.6931 + balance, abs=2e-3)
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"] + 0.1
    assert trainer.states.computed == 2 * len(PAIRS)


def high_words(completions, **_):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(sum(int(word[1:]) > 40 for word in text.split() if word[1:].isdigit())) for text in texts]


@pytest.mark.parametrize("choices", [{"beta": 0.0}, {"beta": 0.1, "num_iterations": 2}, {"entropy_coef": 0.01}])
def test_rewards_are_learned_and_sampler_and_trainer_agree(tmp_path, choices):
    trainer = MoEBiasGRPOTrainer(
        tiny_model(),
        high_words,
        choices_of(
            trl.GRPOConfig,
            tmp_path,
            max_steps=6,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=6,
            temperature=0.7,
            learning_rate=3e-2,
            **choices,
        ),
        train_dataset=Dataset.from_list([{"prompt": text["prompt"]} for text in TEXTS]),
        processing_class=chat_tokenizer(),
        peft_config=None,
        support_size=50,
    )
    worst = []
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        kept = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept)[0]
            logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -kept - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
        worst.append(float(((found - expected) * inputs["completion_mask"]).abs().max()))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert max(worst) < 1e-5
    layer = find_adapter_head(trainer.model).active_layer
    assert len(layer.support) == 50
    assert layer.hidden_mean.any()
    assert any(parameter.any() for name, parameter in layer.named_parameters() if "directions" in name)


def test_a_frozen_model_brings_its_tokenizer(tmp_path):
    base = mb.Frozen(tiny_model(), chat_tokenizer())
    trainer = MoEBiasSFTTrainer(
        base, choices_of(trl.SFTConfig, tmp_path), train_dataset=Dataset.from_list(TEXTS), peft_config=CONFIG
    )
    trainer.train()
    assert trainer.processing_class is base.tokenizer


def test_a_rate_for_whole_models_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        sft(tmp_path, learning_rate=2e-5)
    assert "learning_rate is 2e-05, which is right for a whole model" in caplog.text


def test_what_would_pass_the_adapter_by_is_refused(tmp_path):
    with pytest.raises(UserError, match="no MoEBiasConfig; TRL's own trainers train other methods"):
        sft(tmp_path, peft_config=LoraConfig())
    with pytest.raises(UserError, match="has an adapter of LoraModel; TRL's own trainers train that"):
        sft(tmp_path, get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])), peft_config=None)
    with pytest.raises(UserError, match="`use_liger_kernel` puts another forward"):
        sft(tmp_path, use_liger_kernel=True)
    with pytest.raises(UserError, match="name those in the config's `support`"):
        sft(tmp_path, peft_config=MoEBiasConfig(experts="free"))
    with pytest.raises(UserError, match="`use_vllm` merges an adapter"):
        MoEBiasGRPOTrainer(
            tiny_model(),
            high_words,
            choices_of(trl.GRPOConfig, tmp_path, use_vllm=True, num_generations=4),
            train_dataset=Dataset.from_list([{"prompt": "w5"}]),
            processing_class=chat_tokenizer(),
        )


def test_the_stock_trainer_refuses_it_still(tmp_path):
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        sft(tmp_path, trainer=trl.SFTTrainer)


def test_an_iterable_of_a_vocabulary_smaller_than_the_support(tmp_path):
    trainer = sft(tmp_path, peft_config=MoEBiasConfig(num_experts=2), more={"support_size": 10 * VOCABULARY})
    assert len(find_adapter_head(trainer.model).active_layer.support) == VOCABULARY
