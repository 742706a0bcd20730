"""Prompts and completions as tokens, and where an answer ends.

The chat template decides what a model sees: an answer's tokens are those that it has in the template's text of the
whole conversation, after the tokens that the prompt has when an answer is asked for. An answer that is text is
tokenised as text, whatever it spells: of the special tokens a completion has the template's own alone. What a template
has no place for is never dropped without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_bias.mistakes import UserError, reason_of, shown

Message = dict[str, Any]
"""`role`, `content`, and perhaps `reasoning_content`, `tool_calls` and what templates take besides."""
_MARK = "\u241f"
_PLAIN_ROLES = ("user", "assistant")
"""What every template has a place for."""
_CONTEXTS = ("\n", ".")
"""Texts that hardly any token begins in and goes on after."""


@dataclass(frozen=True)
class Conversation:
    """Turns before the answer, and the answer. `is_chat` is False for plain text to be continued.

    `reply` is the answer as a message where it is more than the text `completion`; `tools` are descriptions for
    the template. `is_sampled`: a model gave the text after the very prompt, without what a template may write around
    an answer. `row` is the row of `source` that it comes from, from 0.
    """

    turns: tuple[Message, ...]
    completion: str
    is_chat: bool = True
    reply: Message | None = None
    tools: tuple[Any, ...] = ()
    is_sampled: bool = False
    row: int = field(default=0, compare=False)
    source: str = field(default="", compare=False)

    def at_row(self, row: int, source: str) -> Conversation:
        """The same, from a row of a source."""
        return replace(self, row=row, source=source)

    @property
    def where(self) -> str:
        """Where it stands, as a sentence says it."""
        return f"row {self.row + 1} of {self.source}" if self.source else "a conversation"

    @property
    def messages(self) -> list[Message]:
        """All turns, the answer last."""
        return [*self.turns, self.reply or {"role": "assistant", "content": self.completion}]


@dataclass(frozen=True)
class Example:
    """A prompt and its completion as token ids; the completion ends with the end-of-turn token unless it was cut."""

    prompt_ids: list[int]
    completion_ids: list[int]
    is_cut: bool = False

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Corpus:
    """Encoded examples, the conversation (from 0) each comes from, and how many gave none for lack of room.

    `unreasoned` counts the conversations whose reasoning the chat template has no place for.
    """

    examples: list[Example]
    rows: list[int]
    left_out: int
    unreasoned: int = 0

    @property
    def cut(self) -> int:
        """Completions that the length limit cut."""
        return sum(example.is_cut for example in self.examples)


def ask(question: str, answer: str = "", is_chat: bool = True) -> Conversation:
    """A conversation of one question, and its answer; or, where it is no chat, a text and how it goes on."""
    return Conversation(({"role": "user", "content": question},), answer, is_chat)


def prompt_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model is to see it. Raises UserError without a chat template for a chat."""
    if not conversation.is_chat:
        text: str = conversation.turns[0]["content"]
        return text
    _require_chat_template(tokenizer)
    return _rendered(conversation, conversation.turns, tokenizer, add_generation_prompt=True)


def encode_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt; a chat template brings its own special tokens, and a text goes on: none closes it."""
    text = prompt_text(conversation, tokenizer)
    if conversation.is_chat:
        return _ids(text, tokenizer)
    ids: list[int] = tokenizer(text).input_ids
    return ids[: len(ids) - _closing_tokens(tokenizer)]


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example | None:
    """Token ids of prompt and completion, cut to `max_length` together.

    None where the prompt alone leaves no room for a completion. Without any prompt token nothing
    predicts the completion's first token, which then stands as the prompt. Raises UserError where the chat
    template has no place for a turn or a call of tools.
    """
    prompt_ids = encode_prompt(conversation, tokenizer)
    if conversation.is_chat:
        _check_places(conversation, tokenizer)
    completion_ids = _completion_ids(conversation, tokenizer)
    if not prompt_ids:
        prompt_ids, completion_ids = completion_ids[:1], completion_ids[1:]
    room = max_length - len(prompt_ids)
    if room < 1 or not completion_ids:
        return None
    return Example(prompt_ids, completion_ids[:room], is_cut=len(completion_ids) > room)


def encode_all(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Corpus:
    """Every conversation that has room for a completion. Raises UserError as `encode` does."""
    encoded = [encode(conversation, tokenizer, max_length) for conversation in conversations]
    found = [(row, example) for row, example in enumerate(encoded) if example is not None]
    unreasoned = sum(_loses_reasoning(conversation, tokenizer) for conversation in conversations)
    return Corpus([example for _, example in found], [row for row, _ in found], len(encoded) - len(found), unreasoned)


def end_of_turn(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an answer to learn: what the chat template puts after one, else EOS."""
    return _ending(conversation, tokenizer).ids


def answer_ends(model: Any, tokenizer: PreTrainedTokenizerBase, is_chat: bool = True) -> list[int]:
    """The tokens that end an answer, ascending: whatever generates stops at any of them.

    They are the model's own ends of text (a list of its `generation_config`), the tokenizer's, and in a chat the end
    of a turn that adapters learn. Every chosen support must hold them.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *([own] if own is None or isinstance(own, int) else own)}
    if is_chat and tokenizer.chat_template:
        found.update(end_of_turn(ask(""), tokenizer))
    vocab_size = model.config.get_text_config().vocab_size
    return sorted(token for token in found if token is not None and 0 <= token < vocab_size)


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; give plain text "
            "in prompt and completion columns instead of questions or messages, or write a template into its folder, "
            "as chat_template.jinja"
        )


def _rendered(
    conversation: Conversation,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = False,
) -> str:
    """The template's text of messages; a template is code of the model's, and refuses a turn by any error."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=list(conversation.tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{conversation.where}: the chat template of {tokenizer.name_or_path!r} refuses its turns of "
            f"{shown(roles)} ({reason_of(error)})"
        ) from error
    return text


@dataclass(frozen=True)
class _Ending:
    """What the template writes after an answer, the part of it before the token that ends the turn, and that token."""

    after: str
    gap: str
    ids: list[int]


def _ending(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> _Ending:
    after = ""
    if conversation.is_chat:
        turns = [*conversation.turns, {"role": "assistant", "content": _MARK}]
        after = _rendered(conversation, turns, tokenizer).rpartition(_MARK)[2]
        added = _added_tokens(after, tokenizer)
        # a tokenizer may not know that the end of a turn is special, but every one has it whole
        ends = [token for token in added if token.special] or [token for token in added if token.content.strip()]
        if ends:
            return _Ending(after, after.partition(ends[0].content)[0], _ids(ends[0].content, tokenizer))
    return _Ending(after, "", [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _completion_ids(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer's token ids and the end of its turn."""
    ending, prompt = _ending(conversation, tokenizer), prompt_text(conversation, tokenizer)
    if conversation.is_sampled:  # decoded by itself, which takes away what a tokenizer puts before a text
        return _ids(conversation.completion, tokenizer, is_text=True) + ending.ids
    if conversation.reply is None:
        opening, text = _written(conversation, prompt, ending.after, tokenizer)
        ids = _continued(text + ending.gap, prompt + opening, tokenizer, is_text=True)
        return [*_ids(opening, tokenizer), *ids, *ending.ids]
    ids = _continued(_reply_text(conversation, tokenizer), prompt, tokenizer, is_text=False)
    if ending.ids and ending.ids[0] in ids:
        return ids[: len(ids) - ids[::-1].index(ending.ids[0])]
    return ids + ending.ids


def _written(
    conversation: Conversation, prompt: str, after: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """What the template writes for an answer that is text: up to its own last special token, and from there.

    Where it does not write the answer itself after the prompt, this is the answer as it was given.
    """
    if conversation.is_chat:
        whole, answer = _rendered(conversation, conversation.messages, tokenizer), conversation.completion.strip()
        written = whole.removeprefix(prompt).removesuffix(after)
        if whole.startswith(prompt) and written.rstrip().endswith(answer):
            before = written.rstrip().removesuffix(answer)
            special = [token for token in _added_tokens(before, tokenizer) if token.special]
            place = before.rindex(special[-1].content) + len(special[-1].content) if special else 0
            return written[:place], written[place:]
    return "", conversation.completion


def _continued(text: str, before: str, tokenizer: PreTrainedTokenizerBase, is_text: bool) -> list[int]:
    """Token ids of a text that goes on from another, of which no token lies in both.

    Most tokenizers give a text the same tokens wherever it stands. Others put a space before whatever begins, which
    a text that goes on must not have. `is_text`: what spells a special token is none.
    """
    contexts = [context for context in _CONTEXTS if _is_known(context, tokenizer)]
    marks_beginnings = not any(_is_beginning(context, tokenizer) for context in contexts)
    if marks_beginnings and not _is_beginning(before, tokenizer):
        for context in contexts:
            own, both = (_ids(part, tokenizer, is_text) for part in (context, context + text))
            if both[: len(own)] == own:
                return both[len(own) :]
    return _ids(text, tokenizer, is_text)


def _is_known(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary has tokens for all of a text; an unknown one may take in what stands after it."""
    return text in tokenizer.decode(_ids(text, tokenizer))


def _is_beginning(before: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what stands after a text has the tokens that it has alone."""
    return _ids(f"{before}a", tokenizer) == _ids(before, tokenizer) + _ids("a", tokenizer)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, is_text: bool = False) -> list[int]:
    """Token ids without any that the tokenizer adds; `is_text`: what spells a special token is none."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=is_text).input_ids
    return ids


def _added_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The tokens that a text spells and that stand outside the vocabulary's rules, special ones among them.

    `all_special_ids` lacks those that no attribute of the tokenizer names, as Llama 3's end of turn.
    """
    if not text:
        return []
    known = tokenizer.added_tokens_decoder
    found = [known[token] for token in _ids(text, tokenizer) if token in known]
    return [token for token in found if token.content in text]  # what is unknown spells no token


def _closing_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer adds after a text."""
    ids, bare = tokenizer("a").input_ids, _ids("a", tokenizer)
    starts = [start for start in range(len(ids)) if bare and ids[start : start + len(bare)] == bare]
    return len(ids) - starts[0] - len(bare) if starts else 0


def _reply_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes for the reply, after the prompt."""
    _refuse_special_tokens(conversation, tokenizer)
    prompt = prompt_text(conversation, tokenizer)
    whole = _rendered(conversation, conversation.messages, tokenizer)
    if not whole.startswith(prompt):
        raise UserError(
            f"{conversation.where}: the chat template of {tokenizer.name_or_path!r} does not write the answer after "
            "the prompt that it gives for one; leave its reasoning or its tool calls out"
        )
    return whole[len(prompt) :]


def _refuse_special_tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """A reply is tokenised with the template's special tokens, so its own texts must not spell any."""
    for text in texts_in(conversation.reply):
        for token in _added_tokens(text, tokenizer):
            if token.special:
                raise UserError(
                    f"{conversation.where}: an answer with reasoning or tool calls spells the special token "
                    f"{token.content!r}, which could not be told from the template's own"
                )


def _check_places(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where leaving a turn, its calls or the tools away would change nothing that the model sees."""
    for place, message in enumerate(conversation.messages):
        if "tool_calls" in message and not _matters(conversation, place, tokenizer, _without_calls):
            _refuse(conversation, tokenizer, "tool calls")
        if message["role"] not in _PLAIN_ROLES and not _matters(conversation, place, tokenizer, _marked):
            _refuse(conversation, tokenizer, f"turns of {shown(message['role'])}")
    if conversation.tools:
        bare = replace(conversation, tools=())
        if prompt_text(bare, tokenizer) == prompt_text(conversation, tokenizer):
            _refuse(conversation, tokenizer, "tools")


def _refuse(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    raise UserError(
        f"{conversation.where}: the chat template of {tokenizer.name_or_path!r} has no place for {what}; leave the row "
        "out, or take a model whose template has one"
    )


def _loses_reasoning(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    return conversation.is_chat and any(
        "reasoning_content" in message and not _matters(conversation, place, tokenizer, _without_reasoning)
        for place, message in enumerate(conversation.messages)
    )


def _matters(
    conversation: Conversation,
    place: int,
    tokenizer: PreTrainedTokenizerBase,
    change: Callable[[Message], Message],
) -> bool:
    """Whether the template's text changes with the message at a place."""
    messages = conversation.messages
    changed = [*messages[:place], change(messages[place]), *messages[place + 1 :]]
    return _rendered(conversation, messages, tokenizer) != _rendered(conversation, changed, tokenizer)


def _without_calls(message: Message) -> Message:
    return {"role": message["role"], "content": message["content"] or ""}


def _without_reasoning(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def _marked(message: Message) -> Message:
    return {**message, "content": f"{message['content'] or ''}{_MARK}"}


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from texts_in(key)
            yield from texts_in(entry)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from texts_in(entry)
