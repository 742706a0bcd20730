"""From the columns of a row to conversations: which turns stand before an answer, and what the answer is.

A row is one of:

- `messages` or `conversations`: a chat, of messages with `role` and `content`, or with `from` and `value` as ShareGPT
  has them. Its last turn is the assistant's answer; or each of the assistant's turns is one (`all-turns`).
- `prompt` and `completion`: text to be continued, or lists of messages. Every turn of the assistant in a completion
  is an answer.
- a pair of the Hub's usual column names (`COLUMN_PAIRS`): a question and its answer. What is in `BESIDE_QUESTIONS`
  (Alpaca's `input`, Dolly's `context`) belongs to the question, and follows it.

A chat may have its system turn in a column of its own (`SYSTEM`). The text of `prompt` stands as it is.
A message's content is text, or a list of parts that are text. An answer may be a call of tools, or have reasoning
before it; a row's `tools` go to the chat template with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from moe_bias.config import TrainOn
from moe_bias.mistakes import AS_PAIRS, UserError, shown
from moe_bias.tasks.conversations import Conversation, Message, ask, texts_in
from moe_bias.tasks.rows import is_missing, read_rows, text_of

COLUMN_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "solution"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("question", "response"),
)
CHATS = ("messages", "conversations")
BESIDE_QUESTIONS = ("input", "context")
SYSTEM = ("system", "system_prompt")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_BESIDE_CONTENT = ("name", "tool_call_id")


def read_conversations(source: str, split: str, train_on: TrainOn = "last-turn") -> list[Conversation]:
    """Conversations of a JSON Lines file or of a Hub data set's split, in order, each with the row it comes from.

    Raises UserError on a file that is missing, empty or not JSON, on a row without known columns or with
    anything in them that cannot be an answer or what stands before it, naming the row and the column.
    """
    return conversations_of(read_rows(source, split), source, train_on)


def conversations_of(rows: Iterable[Any], source: str, train_on: TrainOn = "last-turn") -> list[Conversation]:
    """Conversations of rows in memory, which `source` names to a reader. Raises UserError as `read_conversations`."""
    found = [one for number, row in enumerate(rows) for one in _Row(row, number, source).conversations(train_on)]
    if not found:
        raise UserError(f"{source} are none; give at least one")
    return found


def rows_in_memory(rows: Any, source: str) -> Iterable[Any]:
    """The rows of a list, a data set or a data frame. Raises UserError on what has no rows one after another."""
    if type(rows).__name__ == "DataFrame" and hasattr(rows, "to_dict"):
        records: list[Any] = rows.to_dict("records")
        return records
    if isinstance(rows, Mapping):
        raise UserError(
            f"{source} are a mapping with {shown([str(key) for key in rows])}; give a list with a dict for each row, "
            "or one of the splits, as in data_set['train']"
        )
    if not isinstance(rows, Iterable):
        raise UserError(f"{source} are a {type(rows).__name__}; give a list with a dict for each row, or a file")
    return rows


@dataclass(frozen=True)
class _Row:
    """A row of a source, its number from 0."""

    value: Any
    number: int
    source: str

    @property
    def where(self) -> str:
        return f"row {self.number + 1} of {self.source}"

    def conversations(self, train_on: TrainOn) -> list[Conversation]:
        """One for each answer that counts. Raises UserError where there is none."""
        if not isinstance(self.value, Mapping):
            raise UserError(f"{self.where} is not an object with columns but {shown(self.value)}")
        for column in CHATS:
            if not is_missing(self.value.get(column)):
                return self._of_chat(column, train_on)
        for prompt_column, answer_column in COLUMN_PAIRS:
            if prompt_column in self.value and answer_column in self.value:
                return self._of_pair(prompt_column, answer_column)
        if "chosen" in self.value and "rejected" in self.value:
            raise UserError(f"{self.where} is a preference, with 'chosen' and 'rejected'; pass {AS_PAIRS}")
        pairs = ", ".join(f"{prompt}/{completion}" for prompt, completion in COLUMN_PAIRS)
        raise UserError(
            f"{self.where} has columns {shown(sorted(map(str, self.value)))}; needed are messages, conversations, or "
            f"one of {pairs}"
        )

    def _of_chat(self, column: str, train_on: TrainOn) -> list[Conversation]:
        where = f"{self.where}: {column}"
        messages = self._with_system(self._messages(column))
        if train_on == "all-turns":
            answers = [index for index, message in enumerate(messages) if index and _is_answer(message)]
            if not answers:
                raise UserError(f"{where} has no turn of the assistant after another's")
            return [self._answered(messages, index, where) for index in answers]
        if not _is_answer(messages[-1]):
            raise UserError(
                f"{where} ends with a turn of {shown(messages[-1]['role'])}, not of the assistant; `train_on` "
                "all-turns takes the assistant's turns before it"
            )
        return [self._answered(messages, len(messages) - 1, where)]

    def _of_pair(self, prompt_column: str, answer_column: str) -> list[Conversation]:
        prompt, answer = self.value[prompt_column], self.value[answer_column]
        if prompt_column == "prompt" and (_is_list(prompt) or _is_list(answer)):
            return self._of_turns(prompt_column, answer_column)
        where, answer = f"{self.where}: {answer_column}", self._text(answer_column)
        if prompt_column == "prompt":
            return [self._kept(ask(self._text(prompt_column), answer, is_chat=False), where)]
        rest = {name: value for name, value in self.value.items() if name != prompt_column}
        question = with_context(self._text(prompt_column), rest, self.where)
        turns = self._with_system([{"role": "user", "content": question}])
        return [self._kept(Conversation(tuple(turns), answer), where)]

    def _of_turns(self, prompt_column: str, answer_column: str) -> list[Conversation]:
        """A prompt or an answer of messages, the other perhaps text."""
        before = self._with_system(self._turns(prompt_column, "user"))
        messages = [*before, *self._turns(answer_column, "assistant")]
        where = f"{self.where}: {answer_column}"
        if not _is_answer(messages[-1]):
            raise UserError(f"{where} ends with a turn of {shown(messages[-1]['role'])}, not of the assistant")
        answers = [index for index in range(len(before), len(messages)) if _is_answer(messages[index])]
        return [self._answered(messages, index, where) for index in answers]

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The messages after the system turn that a column of its own has, unless they begin with one."""
        found = next((name for name in SYSTEM if not is_missing(self.value.get(name))), None)
        if found is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._text(found)}, *messages]

    def _turns(self, column: str, role: str) -> list[Message]:
        if _is_list(self.value[column]):
            return self._messages(column)
        return [{"role": role, "content": self._text(column)}]

    def _messages(self, column: str) -> list[Message]:
        value, where = self.value[column], f"{self.where}: {column}"
        if not _is_list(value) or not len(value):
            raise UserError(f"{where} is not a list of messages but {shown(value)}")
        return [message_of(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]

    def _answered(self, messages: Sequence[Message], index: int, where: str) -> Conversation:
        if not index:
            raise UserError(f"{where} has nothing before the assistant's turn; an answer needs a turn to answer")
        turns, answer = tuple(messages[:index]), messages[index]
        reply = answer if answer.keys() - {"role", "content"} else None
        return self._kept(Conversation(turns, answer["content"] or "", reply=reply, tools=self._tools()), where)

    def _kept(self, found: Conversation, where: str) -> Conversation:
        if not found.completion.strip() and "tool_calls" not in (found.reply or {}):
            raise UserError(f"{where}: the answer is empty")
        return found.at_row(self.number, self.source)

    def _text(self, column: str) -> str:
        return text_of(self.value[column], f"{self.where}: {column}")

    def _tools(self) -> tuple[Any, ...]:
        found, where = self.value.get("tools"), f"{self.where}: tools"
        tools = _parsed(found, where) if isinstance(found, str) and found.strip() else found
        if is_missing(tools) or (_is_list(tools) and not len(tools)):
            return ()
        if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
            raise UserError(f"{where} is not a list of descriptions but {shown(tools)}")
        return tuple(_clean(tool, where) for tool in tools)


def with_context(question: str, row: Mapping[str, Any], where: str) -> str:
    """The question of a row, and what other columns say that it is about. Raises UserError where that is no text."""
    beside = [name for name in BESIDE_QUESTIONS if not is_missing(row.get(name))]
    return "\n\n".join([question, *(text_of(row[name], f"{where}: {name}") for name in beside)])


def message_of(value: Any, where: str) -> Message:
    """A message as chat templates take it. Raises UserError, naming `where` it stands, on anything else."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is not a message with role and content but {shown(value)}")
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role = text_of(value.get(role_key), f"{where}: {role_key}")
    if role_key == "from":
        if role.lower() not in _SHAREGPT_ROLES:
            raise UserError(f"{where}: from is {shown(role)}; known are {', '.join(_SHAREGPT_ROLES)}")
        role = _SHAREGPT_ROLES[role.lower()]
    message: Message = {"role": role}
    calls = value.get("tool_calls")
    if not is_missing(calls) and not (_is_list(calls) and not len(calls)):
        message["tool_calls"] = _tool_calls(calls, f"{where}: tool_calls")
    content = value.get(content_key)
    calls_alone = content is None and "tool_calls" in message
    message["content"] = None if calls_alone else _content(content, f"{where}: {content_key}")
    for key in ("reasoning_content", *_BESIDE_CONTENT):
        if not is_missing(value.get(key)):
            message[key] = text_of(value[key], f"{where}: {key}")
    return message


def _content(value: Any, where: str) -> str:
    """Text, or the texts of a list of parts one after the other."""
    if not _is_list(value):
        return text_of(value, where)
    return "".join(_part(part, f"{where}, part {number}") for number, part in enumerate(value, 1))


def _part(value: Any, where: str) -> str:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is not a part with type and text but {shown(value)}")
    if value.get("type") != "text":
        raise UserError(f"{where} is of type {shown(value.get('type'))}; only parts of type 'text' can be read")
    return text_of(value.get("text"), f"{where}: text")


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as templates take them: arguments as an object, which the API of OpenAI has as JSON."""
    if not _is_list(value):
        raise UserError(f"{where} is not a list of calls but {shown(value)}")
    return [_tool_call(call, f"{where}, call {number}") for number, call in enumerate(value, 1)]


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise UserError(f"{where} is not a call of a function but {shown(value)}")
    name = text_of(function.get("name"), f"{where}: name")
    given = function.get("arguments")
    arguments = _parsed(given, f"{where}: arguments") if isinstance(given, str) and given.strip() else given
    if not is_missing(arguments) and not isinstance(arguments, Mapping):
        raise UserError(f"{where}: arguments are not an object but {shown(given)}")
    found = {"type": "function", "function": {"name": name, "arguments": _clean(arguments or {}, where)}}
    return found if is_missing(value.get("id")) else {**found, "id": text_of(value["id"], f"{where}: id")}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {shown(text)}") from error


def _clean(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Without the nulls that tables of objects have where a row lacks a key; every text in it can be tokenised."""
    for text in texts_in(value):
        text_of(text, where)
    return {key: entry for key, entry in value.items() if entry is not None}


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
