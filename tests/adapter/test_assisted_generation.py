"""transformers' assisted generation with an adapter on the target, on the assistant, on both; against no assistance."""

import copy

import pytest
import torch
from peft import get_peft_model

from helpers.models import VOCABULARY, randomise, tiny_model, token_ids, word_tokenizer
from moe_bias import MoEBiasConfig, UserError, find_adapter_head

DRAFTS, LENGTH = 4, 40


def adapted(model, seed=1, scale=1.0):
    """The model under a random adapter that changes what it says."""
    torch.manual_seed(0)
    peft_model = get_peft_model(copy.deepcopy(model), MoEBiasConfig(experts="free", num_experts=4))
    randomise(find_adapter_head(peft_model).active_layer, seed, scale)
    return peft_model.eval()


def plain(**sizes):
    return tiny_model("llama", **sizes)


@pytest.fixture
def target():
    return plain()


def generated(target, assistant=None, **choices):
    """Tokens after the prompt, and how often the target was run for them."""
    passes = []
    head = target.get_output_embeddings()
    hook = head.register_forward_hook(lambda *_: passes.append(1))
    if assistant is not None:
        config = assistant.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = DRAFTS, "constant"
        config.assistant_confidence_threshold = 0
        choices["assistant_model"] = assistant
    prompt = token_ids(1, 5)
    try:
        torch.manual_seed(0)
        found = target.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=LENGTH,
            eos_token_id=None,
            **{"do_sample": False, **choices},
        )
    finally:
        hook.remove()
    return found[0, 5:].tolist(), len(passes)


@pytest.mark.parametrize("on_target", [False, True])
@pytest.mark.parametrize("on_assistant", [False, True])
@pytest.mark.parametrize("is_peft", [False, True])
def test_greedy_answers_are_those_without_assistance(target, on_target, on_assistant, is_peft):
    """Whether the assistant is given as PEFT's model or as the model inside it."""
    told = adapted(target) if on_target else target
    small = plain(hidden_size=8, num_hidden_layers=1)
    helper = adapted(small, seed=2) if on_assistant else small
    if on_assistant and not is_peft:
        helper = helper.get_base_model()
    wanted, _ = generated(told)
    assert generated(told, helper)[0] == wanted
    assert (wanted == generated(target)[0]) != on_target  # the adapter counts


@pytest.mark.parametrize("choices", [{}, {"do_sample": True, "top_k": 0}])
def test_drafts_are_those_of_the_adapted_assistant(target, choices):
    """One that is its own target's equal has all its drafts accepted: each pass gives the drafts and one more."""
    told = adapted(target)
    fewest = -(-LENGTH // (DRAFTS + 1))
    _, alike = generated(told, adapted(target), **choices)
    assert fewest <= alike <= fewest + 1
    _, without = generated(told, target, **choices)
    assert without > alike + 2
    _, other_way = generated(target, adapted(target), **choices)
    assert other_way > alike + 2


def test_a_disabled_adapter_of_the_assistant_has_no_say(target):
    helper = adapted(target)
    _, with_it = generated(target, helper)
    with helper.disable_adapter():
        _, without = generated(target, helper)
    assert without < with_it


def across_tokenizers(target, assistant, **choices):
    """Both know the same words; transformers takes the sizes of the embeddings for other tokenizers."""
    told, helper = word_tokenizer(), word_tokenizer()
    helper.add_tokens(["x1", "x2", "x3"])  # words that the target does not have
    return generated(target, assistant, tokenizer=told, assistant_tokenizer=helper, **choices)


def test_across_tokenizers_greedy_answers_are_those_without_assistance(target):
    """The assistant generates by itself there, and its text is taken."""
    told, wider = adapted(target), plain(vocab_size=VOCABULARY + 3)
    assert across_tokenizers(told, wider)[0] == generated(told)[0]
    assert across_tokenizers(target, adapted(wider))[0] == generated(target)[0]


def test_across_tokenizers_sampled_drafts_of_an_adapted_assistant_are_refused():
    """transformers puts a pruned head in the adapter's place, so its bias would be lost without a word."""
    wider = plain(vocab_size=VOCABULARY + 3)
    with pytest.raises(UserError, match="went past its output embedding, so the MoE-Bias adapter was not applied"):
        across_tokenizers(plain(), adapted(wider), do_sample=True)
