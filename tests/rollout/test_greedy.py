import pytest
import torch
from peft import get_peft_model

from helpers.models import randomise, tiny_model
from moe_bias.adapter import MoEBiasConfig, find_adapter_head
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import base_policy, layer_policy

PROMPTS = [[5, 6, 7, 8], [9], [30, 31, 32], [40, 41, 42, 43, 44, 45]]
STOP = [2]


def generated(model, prompt, limit):
    """What transformers' own generate answers, without the stop token."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=STOP,
        pad_token_id=0,
    )
    new = out[0, len(prompt) :].tolist()
    return (new[: new.index(2)], True) if 2 in new else (new, False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_policys_answers_are_those_of_generate(name, batch_size):
    model = tiny_model(name)
    head = find_head(model)[1]
    config = LayerConfig(experts="free", num_experts=4, support=tuple(range(2, 90)))
    layers = [MoEBiasLayer(config, head.hidden_size, head.vocab_size) for _ in range(2)]
    for seed, layer in enumerate(layers):
        randomise(layer, seed)
    policies = [base_policy, *(layer_policy(layer, head.transform) for layer in layers)]
    answers = greedy_answers(model, head, PROMPTS, policies, stop_ids=STOP, max_new_tokens=12, batch_size=batch_size)
    adapted = get_peft_model(model, MoEBiasConfig(**config.model_dump()))
    attached = find_adapter_head(adapted).moe_bias_layers["default"]
    for column, layer in zip(answers, [None, *layers], strict=True):
        if layer is not None:
            attached.load_state_dict(layer.state_dict())
        for prompt, answer in zip(PROMPTS, column, strict=True):
            if layer is None:
                with adapted.disable_adapter():
                    expected = generated(adapted, prompt, 12)
            else:
                expected = generated(adapted, prompt, 12)
            assert (answer.token_ids, answer.finished) == expected


def test_policies_differ_and_some_answers_stop_early():
    model = tiny_model()
    head = find_head(model)[1]
    stopping = lambda hidden_BD, logits_BV: logits_BV.index_fill(-1, torch.tensor([2]), 1e9)  # noqa: E731
    base, stopped = greedy_answers(
        model, head, PROMPTS, [base_policy, stopping], stop_ids=STOP, max_new_tokens=5, batch_size=4
    )
    assert all(answer.token_ids == [] and answer.finished for answer in stopped)
    assert all(len(answer.token_ids) == 5 for answer in base if not answer.finished)
