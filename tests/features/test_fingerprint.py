import torch
from transformers import AutoTokenizer

from helpers.models import tiny_model
from helpers.saved import save_model
from moe_bias.backbone import find_head
from moe_bias.features.fingerprint import backbone_hash, corpus_hash, head_hash, model_facts, tokenizer_hash
from moe_bias.tasks.conversations import Corpus, Example


def test_a_copy_of_a_model_is_the_same_model(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path))
    first, second = tiny_model(), tiny_model()
    second.name_or_path = second.config._name_or_path = "elsewhere"
    facts = [model_facts(model, find_head(model)[1], tokenizer) for model in (first, second)]
    assert facts[1].name == "elsewhere"
    assert facts[0].model_copy(update={"name": "elsewhere"}) == facts[1]


def test_a_checkpoint_in_half_precision_is_the_same_model_in_float32():
    half = tiny_model().bfloat16()
    wide = tiny_model()
    wide.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    assert backbone_hash(half) == backbone_hash(wide)
    assert head_hash(half.lm_head) == head_hash(wide.lm_head)
    assert head_hash(half.lm_head) != head_hash(tiny_model().lm_head)


def test_every_change_that_changes_the_hidden_states_is_seen():
    before = backbone_hash(tiny_model())
    trained = tiny_model()
    trained.model.layers[1].mlp.up_proj.weight.data += 1e-3
    assert backbone_hash(trained) != before
    assert backbone_hash(tiny_model(rms_norm_eps=1e-3)) != before
    one_weight = tiny_model()
    one_weight.lm_head.weight.data[50, 7] += 1e-3
    assert head_hash(one_weight.lm_head) != head_hash(tiny_model().lm_head)


def test_bias_of_the_output_embedding_is_hashed():
    first, second = tiny_model("phi"), tiny_model("phi")
    second.lm_head.bias.data[3] += 1
    assert head_hash(first.lm_head) != head_hash(second.lm_head)


def test_a_call_of_the_tokenizer_does_not_change_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path))
    before = tokenizer_hash(tokenizer)
    tokenizer(["w5 w6", "w7"], padding=True, truncation=True, max_length=1)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != before
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "plain", chat_template=None))
    assert tokenizer_hash(tokenizer) != before


def test_corpus_hash_tells_prompt_from_completion_and_row_from_row():
    def of(prompt: list[int], completion: list[int], row: int = 0) -> str:
        return corpus_hash(Corpus([Example(prompt, completion)], [row], 0))

    assert len({of([1], [2, 3]), of([1, 2], [3]), of([1], [2, 3], row=1), of([1], [3, 2])}) == 4
    assert of([1], [2, 3]) == of([1], [2, 3])


def test_hashes_read_integers_as_they_are():
    packed = torch.nn.Module()
    packed.register_buffer("weight", torch.arange(6, dtype=torch.uint8))
    other = torch.nn.Module()
    other.register_buffer("weight", torch.arange(1, 7, dtype=torch.uint8))
    assert head_hash(packed) != head_hash(other)
