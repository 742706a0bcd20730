"""Models that change their logits after the output embedding: adapted logits are those of transformers."""

import pytest
import torch
from peft import PeftModel

from helpers.models import VOCABULARY as CHARACTERS
from helpers.models import tiny_model
from helpers.served import ADAPTERS, VOCABULARY, WITHOUT_VLLM, running, write_adapter, write_tokenizer

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason=WITHOUT_VLLM)
from helpers.asking import ask, greedy, prompts, reference_log_probs

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": None}


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_logits_after_a_soft_cap_or_a_scale(name, tmp_path):
    kinds = ("routed", "linear", "far")
    assert CHARACTERS != VOCABULARY
    changes = {"head_dim": 32, "attn_logit_softcapping": None} if name == "gemma2" else {}
    model = tiny_model(name, **SIZES, **changes)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    for kind in kinds:
        write_adapter(tmp_path / "adapters" / kind, model, ADAPTERS[kind])
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapters" / kinds[0], kinds[0]).eval()
    for kind in kinds[1:]:
        adapted.load_adapter(tmp_path / "adapters" / kind, kind)
    asked = [(prompt, kinds[place % len(kinds)]) for place, prompt in enumerate(prompts(9))]
    with running(tmp_path / "model", tmp_path / "adapters", max_model_len=128) as engine:
        answers = ask(engine, [(prompt, greedy(kind, logprobs=-1)) for prompt, kind in asked])
    for (prompt, kind), answer in zip(asked, answers, strict=True):
        adapted.set_adapter(kind)
        expected = reference_log_probs(adapted, prompt, answer.token_ids)
        found = torch.tensor([[step[token].logprob for token in range(VOCABULARY)] for step in answer.logprobs])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
