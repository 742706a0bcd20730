"""What must hold on an accelerator: the same answers as on the CPU, and no adapter left behind there."""

import pytest
import torch
from peft import get_peft_model

from helpers.models import randomise, tiny_model, token_ids
from moe_bias.adapter import MoEBiasConfig, find_adapter_head
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig, SFTConfig
from moe_bias.evaluation.likelihood import token_nll
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout import decoding, fixed
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import base_policy, layer_policy
from moe_bias.rollout.sampler import SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.tasks.conversations import Example
from moe_bias.training.sft import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SUPPORT = list(range(2, 60))


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_adapted_logits_are_those_of_the_cpu(name):
    adapted = get_peft_model(tiny_model(name), MoEBiasConfig(experts="free", num_experts=4, support=SUPPORT)).eval()
    randomise(find_adapter_head(adapted).moe_bias_layers["default"])
    ids = token_ids()
    with torch.no_grad():
        on_cpu = adapted(ids).logits
        on_gpu = adapted.to("cuda")(ids.cuda()).logits.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


def test_features_training_and_answers_on_the_gpu():
    model = tiny_model().cuda()
    head = find_head(model)[1]
    examples = [Example([5, 6, 7], [8, 9, 2]), Example([5, 9], [11, 8, 2])]
    features = with_scalars(head, run_backbone(model, examples, 2, "test"), SUPPORT, "test")
    layer = MoEBiasLayer(
        LayerConfig(experts="free", num_experts=4, support=tuple(SUPPORT)), head.hidden_size, head.vocab_size
    ).cuda()
    fit(layer, features, head, SFTConfig(epochs=400, expert_rate=0.5), "test")
    assert token_nll(layer, features, head).mean() < token_nll(None, features, head).mean() - 1
    base, adapted = greedy_answers(
        model,
        head,
        [example.prompt_ids for example in examples],
        [base_policy, layer_policy(layer, head.transform)],
        stop_ids=[2],
        max_new_tokens=8,
        batch_size=2,
    )
    assert [answer.token_ids for answer in adapted] == [example.completion_ids[:-1] for example in examples]
    assert base != adapted


def test_what_a_sampler_on_the_gpu_keeps_is_what_extraction_on_the_cpu_gives():
    model = tiny_model().cuda()
    head = find_head(model)[1]
    layer = MoEBiasLayer(
        LayerConfig(experts="free", num_experts=4, support=tuple(SUPPORT)), head.hidden_size, head.vocab_size
    )
    randomise(layer)
    choices = SamplingChoices(temperature=0.7, max_new_tokens=6, group=3, batch_size=2, stop_ids=[])
    prompts = [[5, 6, 7], [9]]
    rollouts = TransformersSampler(model, head).sample(prompts, layer.cuda(), choices, 0)
    examples = [Example(prompts[i // 3], answer.token_ids) for i, answer in enumerate(rollouts.answers)]
    model.cpu()
    expected = with_scalars(head, run_backbone(model, examples, 2, "test"), SUPPORT, "test")
    assert rollouts.features.token.tolist() == expected.token.tolist()
    torch.testing.assert_close(rollouts.features.hidden, expected.hidden, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rollouts.features.entropy, expected.entropy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_a_graph_gives_the_samples_of_rows_that_move(name, monkeypatch):
    model = tiny_model(name).double().cuda()
    head = find_head(model)[1]
    layer = MoEBiasLayer(LayerConfig(experts="free", num_experts=4, support=tuple(SUPPORT)), head.hidden_size, 97)
    randomise(layer)
    choices = SamplingChoices(temperature=1.0, max_new_tokens=40, group=9, batch_size=3, stop_ids=[2, 11, 30])
    assert fixed.goes_into_a_graph(model, 40, 2**20)
    assert not fixed.goes_into_a_graph(model, 40, torch.cuda.mem_get_info()[0])
    found = TransformersSampler(model, head).sample([[5, 6, 7], [9], [12, 13]], layer.cuda(), choices, 0)
    monkeypatch.setattr(decoding, "goes_into_a_graph", lambda *_: False)
    expected = TransformersSampler(model, head).sample([[5, 6, 7], [9], [12, 13]], layer.cuda(), choices, 0)
    assert found.answers == expected.answers
    torch.testing.assert_close(found.features.hidden, expected.features.hidden)


def test_each_row_has_an_adapter_of_its_own_on_the_gpu():
    adapted = get_peft_model(tiny_model(), MoEBiasConfig(num_experts=3, support=SUPPORT), adapter_name="one").eval()
    adapted.add_adapter("two", MoEBiasConfig(experts="free", num_experts=2))
    for seed, layer in enumerate(find_adapter_head(adapted).moe_bias_layers.values()):
        randomise(layer, seed=seed + 1)
    ids, names = token_ids(batch=4), ["two", "__base__", "one", "two"]
    with torch.no_grad():
        on_cpu = adapted(ids, adapter_names=names).logits
        adapted.base_model.set_adapter(["one", "two"])
        both = adapted(ids).logits
        on_gpu = adapted.to("cuda")(ids.cuda(), adapter_names=names).logits.cpu()
        torch.testing.assert_close(adapted(ids.cuda()).logits.cpu(), both, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trls_trainer_on_the_gpu(tmp_path, dtype):
    pytest.importorskip("trl")
    from helpers.trl_training import TEXTS, sft

    trainer = sft(tmp_path, tiny_model().to("cuda", dtype), use_cpu=False, max_steps=-1, num_train_epochs=6)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.states.computed == len(TEXTS)
