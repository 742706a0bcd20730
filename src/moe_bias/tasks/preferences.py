"""Preferences: of one prompt an answer that was chosen and one that was rejected, as TRL has them.

A row has `chosen` and `rejected`, each text or a list of messages, and `prompt`, text or messages; text goes on from a
prompt of text. Where `chosen` and `rejected` are whole chats, which begin with the prompt's turns or have no prompt
beside them, what they begin with in common is the prompt. Each then is one turn of the assistant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_bias.mistakes import UserError, shown
from moe_bias.tasks.columns import SYSTEM, message_of
from moe_bias.tasks.conversations import Conversation, Corpus, Message, ask, encode_all
from moe_bias.tasks.rows import is_missing, read_rows, text_of

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt."""

    chosen: Conversation
    rejected: Conversation


def read_preferences(source: str, split: str = "train") -> list[Preference]:
    """The preferences of a file of JSON or of a Hub data set's split, in order. Raises UserError as `preferences`."""
    return preferences(read_rows(source, split), source)


def preferences(rows: Iterable[Any], source: str = "the rows") -> list[Preference]:
    """The preferences that rows hold, in order.

    Raises UserError on a row without `chosen` and `rejected`, or whose prompt or answers cannot be told, naming it.
    """
    return [_preference(row, number, source) for number, row in enumerate(rows)]


def encode_preferences(pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Corpus:
    """Both answers of each pair as examples, one after the other.

    The corpus' `rows` are 2i for the chosen answer of pair i, 2i + 1 for the rejected one. A pair of which an answer
    has no room beside its prompt is left out whole.
    """
    return whole_pairs(encode_all(both_sides(pairs), tokenizer, max_length))


def both_sides(pairs: Sequence[Preference]) -> list[Conversation]:
    """The chosen answer of each pair, and after it the rejected one."""
    return [side for pair in pairs for side in (pair.chosen, pair.rejected)]


def whole_pairs(corpus: Corpus) -> Corpus:
    """A corpus of `both_sides` without the answers whose other one has no room."""
    there = set(corpus.rows)
    kept = [(row, one) for row, one in zip(corpus.rows, corpus.examples, strict=True) if row ^ 1 in there]
    left_out = corpus.left_out + len(corpus.rows) - len(kept)
    return replace(corpus, examples=[one for _, one in kept], rows=[row for row, _ in kept], left_out=left_out)


def _preference(row: Any, number: int, source: str) -> Preference:
    where = f"row {number + 1} of {source}"
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is not an object with columns but {shown(row)}")
    for name in SIDES:
        if is_missing(row.get(name)):
            raise UserError(
                f"{where} has columns {shown(sorted(map(str, row)))}; a preference needs {name}, beside prompt, "
                "chosen and rejected"
            )
    if not is_missing(row.get("tools")) and len(row["tools"]):
        raise UserError(
            f"{where} has tools, which a preference between two answers has no place for; leave the row out"
        )
    if isinstance(row["chosen"], str) and isinstance(row.get("prompt"), str):
        chosen, rejected = (ask(row["prompt"], _answer(row, name, where), is_chat=False) for name in SIDES)
        text_of(row["prompt"], f"{where}: prompt")
    else:
        chosen, rejected = _chats(row, where)
    return Preference(chosen.at_row(number, source), rejected.at_row(number, source))


def _chats(row: Mapping[str, Any], where: str) -> tuple[Conversation, Conversation]:
    before = [] if is_missing(row.get("prompt")) else _turns(row, "prompt", "user", where)
    sides = [_turns(row, name, "assistant", where) for name in SIDES]
    if all(side[: len(before)] == before for side in sides):
        common = next((n for n, pair in enumerate(zip(*sides, strict=False)) if pair[0] != pair[1]), None)
        common = min(map(len, sides)) - 1 if common is None else common
        before, sides = sides[0][:common], [side[common:] for side in sides]
    system = next((name for name in SYSTEM if not is_missing(row.get(name))), None)
    if system is not None and before and before[0]["role"] != "system":
        before = [{"role": "system", "content": text_of(row[system], f"{where}: {system}")}, *before]
    if not before:
        raise UserError(
            f"{where}: chosen and rejected have no turn in common that would be their prompt; give a prompt"
        )
    for name, side in zip(SIDES, sides, strict=True):
        if len(side) != 1 or side[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in side)
            raise UserError(
                f"{where}: after the prompt {name} has turns of {shown(roles)}; a preference is between two answers, "
                "each one turn of the assistant"
            )
        if not (side[0]["content"] or "").strip():
            raise UserError(f"{where}: {name}: the answer is empty")
    chosen, rejected = (Conversation(tuple(before), side[0]["content"], reply=_reply(side[0])) for side in sides)
    return chosen, rejected


def _reply(message: Message) -> Message | None:
    return message if message.keys() - {"role", "content"} else None


def _turns(row: Mapping[str, Any], column: str, role: str, where: str) -> list[Message]:
    value, there = row[column], f"{where}: {column}"
    if isinstance(value, str):
        return [{"role": role, "content": text_of(value, there)}]
    if not isinstance(value, Sequence) or not len(value):
        raise UserError(f"{there} is neither text nor a list of messages but {shown(value)}")
    return [message_of(message, f"{there}, message {number}") for number, message in enumerate(value, 1)]


def _answer(row: Mapping[str, Any], column: str, where: str) -> str:
    text = text_of(row[column], f"{where}: {column}")
    if not text.strip():
        raise UserError(f"{where}: {column}: the answer is empty")
    return text
