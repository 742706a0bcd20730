"""The method in one file is the package's, to 1e-6: bias, kept scalars, likelihood, the loss of rewards, gradients."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.models import randomise, word_tokenizer
from moe_bias.backbone import HeadTransform, find_head
from moe_bias.config import LayerConfig
from moe_bias.features.adapted import adapted_policy
from moe_bias.features.extract import answer_features
from moe_bias.training.advantage import select_high_entropy
from moe_bias.training.objectives import DAPO, Now, Sampled, Then

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import moe_bias_minimal as minimal


def both(vocabulary, hidden, size, experts, top_k, rank, tokens, seed):
    """The same layer as each has it, on the same tokens, whose base logits are given too."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=1)
    head = find_head(LlamaForCausalLM(config))[1]
    head.module.weight.requires_grad_(False).mul_(50)
    support = torch.randperm(vocabulary, generator=generator)[:size]
    layer = head.layer(LayerConfig(num_experts=experts, top_k=top_k, expert_rank=rank, support=tuple(support.tolist())))
    randomise(layer, seed=seed, scale=0.2)
    other = minimal.MoEBias(head.module.weight, support, experts, top_k, rank)
    with torch.no_grad():
        other.router.weight.copy_(layer.router.weight)
        for name in ("directions", "writes", "reads"):
            getattr(other, name).copy_(getattr(layer, name))
        other.alpha.copy_(layer.entropy_gate.weight.squeeze())
        other.beta.copy_(layer.entropy_gate.bias.squeeze())
    other.mean_D, other.scale_D = layer.hidden_mean, layer.hidden_scale
    hidden_TD = torch.randn(tokens, hidden, generator=generator)
    token_T = torch.randint(vocabulary, (tokens,), generator=generator)
    features = answer_features(head, hidden_TD, token_T, support)
    return head, layer, other, features, minimal.observe(head.logits(hidden_TD), hidden_TD, token_T, support)


SIZES = {
    "vocabulary": st.integers(5, 60),
    "hidden": st.sampled_from([2, 6, 14]),
    "experts": st.integers(2, 5),
    "rank": st.integers(1, 4),
    "tokens": st.integers(1, 12),
    "seed": st.integers(0, 99),
}


def named(layer):
    """The trained tensors, in one order for both."""
    gate = (
        (layer.alpha, layer.beta) if hasattr(layer, "alpha") else (layer.entropy_gate.weight, layer.entropy_gate.bias)
    )
    return [layer.router.weight, layer.directions, layer.writes, layer.reads, *gate]


def check_gradients(loss, layer, other_loss, other):
    ours, theirs = torch.autograd.grad(loss, named(layer)), torch.autograd.grad(other_loss, named(other))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.flatten(), two.flatten(), atol=1e-6, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(**SIZES, data=st.data())
def test_likelihood_and_rewards_are_the_packages(vocabulary, hidden, experts, rank, tokens, seed, data):
    size, top_k = data.draw(st.integers(1, vocabulary)), data.draw(st.integers(1, experts))
    head, layer, other, features, kept = both(vocabulary, hidden, size, experts, top_k, rank, tokens, seed)
    torch.testing.assert_close(kept.entropy_T, features.entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept.rest_T, features.rest.log_sum_exp, atol=1e-5, rtol=1e-5)
    bias_TM = layer(features.hidden, features.entropy).bias
    torch.testing.assert_close(other(kept.hidden_TD, kept.entropy_T), bias_TM, atol=2e-6, rtol=1e-5)

    logits_TM = head.columns(features.support)(features.hidden)
    policy = adapted_policy(layer, features, logits_TM, HeadTransform())
    found = minimal.log_prob(other, kept).float()
    torch.testing.assert_close(found, policy.log_prob.float(), atol=1e-5, rtol=1e-5)
    check_gradients(-policy.log_prob.mean(), layer, minimal.supervised_loss(other, kept), other)

    generator = torch.Generator().manual_seed(seed)
    sampled_T = policy.log_prob.detach() + 0.3 * torch.randn(tokens, generator=generator)
    advantage_T, entropy_T = torch.randn(tokens, generator=generator), torch.rand(tokens, generator=generator)
    forks_T, _ = select_high_entropy(entropy_T, 0.2)
    policy = adapted_policy(layer, features, logits_TM.clone(), HeadTransform())
    terms = DAPO()(Now(policy.log_prob), Then(features, Sampled(sampled_T, advantage_T)))
    expected = terms.loss[forks_T].mean()
    loss = minimal.reward_loss(other, kept, sampled_T, advantage_T, entropy_T)
    torch.testing.assert_close(loss.float(), expected.float(), atol=1e-6, rtol=1e-5)
    check_gradients(expected, layer, loss, other)


def test_it_trains_and_answers_with_a_model_of_transformers(monkeypatch, capsys, tmp_path):
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["moe_bias_minimal.py", "--model", str(tmp_path), "--steps", "20", "--support", "40"]
    )
    minimal.main()
    said = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[2]) for line in (said[0], said[-2]))
    assert last < first
    assert said[-1].startswith("What is 3 plus 7? ->")


def test_it_is_one_short_file_of_plain_pytorch():
    text = Path(minimal.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert "import moe_bias" not in text
    assert "from moe_bias" not in text


def test_off_the_support_nothing_moves():
    head, _, other, features, kept = both(20, 6, 5, 3, 2, 2, 8, seed=1)
    logits_TV = head.logits(features.hidden).double()
    bias_TM = other(kept.hidden_TD, kept.entropy_T).double()
    whole_TV = logits_TV.index_add(-1, other.support_M, bias_TM).log_softmax(-1)
    expected = whole_TV.gather(-1, kept.token_T[:, None]).squeeze(-1)
    torch.testing.assert_close(minimal.log_prob(other, kept), expected, atol=1e-5, rtol=1e-5)
    assert (bias_TM.abs() > 1e-3).any()
    with pytest.raises(IndexError):
        minimal.observe(head.logits(features.hidden), kept.hidden_TD, kept.token_T, torch.tensor([20]))
