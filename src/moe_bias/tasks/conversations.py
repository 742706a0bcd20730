"""Prompts and completions: reading them from files or the Hub, and turning them into tokens.

A row is one of: `messages` (a chat whose last turn is the assistant's), `prompt` and `completion`
(text, or lists of messages), or a pair of the Hub's usual column names (`COLUMN_PAIRS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_bias.config import UserError
from moe_bias.mistakes import reason_of

COLUMN_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("query", "response"),
    ("input", "output"),
)
Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Turns before the answer, and the answer. `is_chat` is False for plain text to be continued."""

    turns: tuple[Message, ...]
    completion: str
    is_chat: bool = True


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
    """Encoded examples, the row (from 0) each comes from, and how many rows gave none for lack of room."""

    examples: list[Example]
    rows: list[int]
    left_out: int

    @property
    def cut(self) -> int:
        """Completions that the length limit cut."""
        return sum(example.is_cut for example in self.examples)


def ask(question: str, answer: str = "", is_chat: bool = True) -> Conversation:
    """A conversation of one question, and its answer; or, where it is no chat, a text and how it goes on."""
    return Conversation(({"role": "user", "content": question},), answer, is_chat)


def read_conversations(source: str, split: str) -> list[Conversation]:
    """Conversations of a JSON Lines file or of a Hub data set's split.

    Raises UserError on a file that is missing, empty or not JSON Lines, on a row without known
    columns, and on an empty completion, naming the row.
    """
    rows = read_rows(source, split)
    return [_conversation(row, f"row {number} of {source}") for number, row in enumerate(rows, 1)]


def read_rows(source: str, split: str, configuration: str | None = None) -> Sequence[Any]:
    """The rows of a JSON Lines file or of a Hub data set's split, whatever stands in them.

    `configuration` names a part of a Hub data set that has several.
    Raises UserError on a source that is missing or empty, and on a file that is not JSON Lines.
    """
    rows = _file_rows(Path(source)) if Path(source).is_file() else _hub_rows(source, split, configuration)
    if not len(rows):
        raise UserError(f"{source} has no rows")
    return rows


def prompt_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model is to see it. Raises UserError without a chat template for a chat."""
    if not conversation.is_chat:
        return conversation.turns[0]["content"]
    _require_chat_template(tokenizer)
    text: str = tokenizer.apply_chat_template(list(conversation.turns), tokenize=False, add_generation_prompt=True)
    return text


def encode_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt; a chat template brings its own special tokens."""
    ids: list[int] = tokenizer(
        prompt_text(conversation, tokenizer), add_special_tokens=not conversation.is_chat
    ).input_ids
    return ids


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example | None:
    """Token ids of prompt and completion, cut to `max_length` together.

    None where the prompt alone leaves no room for a completion. Without any prompt token nothing
    predicts the completion's first token, which then stands as the prompt.
    """
    prompt_ids = encode_prompt(conversation, tokenizer)
    completion_ids: list[int] = tokenizer(conversation.completion, add_special_tokens=False).input_ids
    completion_ids = completion_ids + end_of_turn(conversation, tokenizer)
    if not prompt_ids:
        prompt_ids, completion_ids = completion_ids[:1], completion_ids[1:]
    room = max_length - len(prompt_ids)
    if room < 1 or not completion_ids:
        return None
    return Example(prompt_ids, completion_ids[:room], is_cut=len(completion_ids) > room)


def encode_all(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Corpus:
    """Every conversation that has room for a completion."""
    encoded = [encode(conversation, tokenizer, max_length) for conversation in conversations]
    found = [(row, example) for row, example in enumerate(encoded) if example is not None]
    return Corpus([example for _, example in found], [row for row, _ in found], len(encoded) - len(found))


def end_of_turn(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an answer: what the chat template puts after one, else EOS."""
    if conversation.is_chat:
        mark = "\u241f"
        turns = [*conversation.turns, {"role": "assistant", "content": mark}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2]
        ids: list[int] = tokenizer(after, add_special_tokens=False).input_ids
        special = [token for token in ids if token in tokenizer.all_special_ids]
        if special:
            return special[:1]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ends of an answer in a chat and of a text, ascending: what every chosen support must hold."""
    of_answer = end_of_turn(ask(""), tokenizer) if tokenizer.chat_template else []
    found = {*of_answer, tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None)


def _require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; give plain text "
            "in prompt and completion columns instead of questions or messages"
        )


def _file_rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    rows = []
    # Not `splitlines`, which also breaks a line at U+2028 and others that may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} of {path} is not JSON: {error}") from error
    return rows


def _hub_rows(name: str, split: str, configuration: str | None) -> Sequence[Mapping[str, Any]]:
    if name.endswith((".jsonl", ".json")):
        raise UserError(f"{name} is not a file")
    from datasets import load_dataset

    try:
        rows: Sequence[Mapping[str, Any]] = load_dataset(name, configuration, split=split)
    except Exception as error:  # a folder or data set that is none makes its loaders raise anything
        raise UserError(
            f"{name!r} is neither a file nor a data set that the Hub delivered ({reason_of(error)})"
        ) from error
    return rows


def _conversation(row: Any, where: str) -> Conversation:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is not an object with columns but {row!r}")
    found = _from_messages(row) or _from_pair(row)
    if found is None:
        pairs = ", ".join(f"{prompt}/{completion}" for prompt, completion in COLUMN_PAIRS)
        raise UserError(f"{where} has columns {sorted(row)}; needed are messages, or one of {pairs}")
    if not isinstance(found.completion, str):
        raise UserError(f"{where}: its completion is not text but {found.completion!r}")
    if not found.completion.strip():
        raise UserError(f"{where} has an empty completion")
    return found


def _from_messages(row: Mapping[str, Any]) -> Conversation | None:
    messages = row.get("messages")
    if not messages or messages[-1].get("role") != "assistant":
        return None
    return Conversation(tuple(messages[:-1]), messages[-1]["content"])


def _from_pair(row: Mapping[str, Any]) -> Conversation | None:
    for prompt_key, completion_key in COLUMN_PAIRS:
        if prompt_key in row and completion_key in row:
            return _paired(prompt_key, row[prompt_key], row[completion_key], str(row.get("input") or ""))
    return None


def _paired(prompt_key: str, prompt: Any, completion: Any, context: str) -> Conversation:
    if isinstance(prompt, list):
        return Conversation(tuple(prompt), completion if isinstance(completion, str) else completion[-1]["content"])
    if prompt_key == "prompt":
        return ask(prompt, completion, is_chat=False)
    if prompt_key == "instruction" and context:
        prompt = f"{prompt}\n\n{context}"
    return ask(prompt, completion)
