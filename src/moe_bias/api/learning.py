"""Learning from feedback on answers, by the learner that `moe-bias chat --learn` has, without a server.

Each row of feedback becomes a lesson as it would there, and is applied in the rows' order: some are kept to measure by,
an update keeps its bounds in exact KL or is not published, earlier ones are replayed. The learner computes on one
thread of the CPU, as the server's does, so that the same lessons give the same bytes.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_bias.api.arguments import config_of, named, refuse_other_base, refuse_other_layer
from moe_bias.api.reports import Report
from moe_bias.config import LearnConfig
from moe_bias.features.examples import length_limit
from moe_bias.features.extract import Features, answer_features
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.learning.fresh import fresh_layer
from moe_bias.learning.journal import Entry
from moe_bias.learning.learner import LESSON, Learner, Outcome
from moe_bias.learning.lessons import Lesson, pair_lesson, pair_parts, refuse_no_reward, reward_lesson
from moe_bias.learning.process import head_alone
from moe_bias.mistakes import UserError, shown
from moe_bias.progress import meter
from moe_bias.report.table import Column, Table
from moe_bias.server.prefixes import Prefix, extended
from moe_bias.tasks.columns import message_of, rows_in_memory
from moe_bias.tasks.conversations import Conversation, Message, answer_ends, encode_prompt, end_of_turn
from moe_bias.tasks.rows import is_missing, read_rows, text_of

Kind = Literal["edit", "reward", "prefer"]
KINDS: tuple[Kind, ...] = ("edit", "reward", "prefer")
ARGUMENT = "`feedback`"


def learn(
    base: Frozen,
    feedback: Iterable[Mapping[str, Any]] | str | Path,
    layer: MoEBiasLayer | None = None,
    config: LearnConfig | None = None,
    *,
    chat: bool = True,
) -> tuple[MoEBiasLayer, LearnReport]:
    """Learns from what is said of answers, one after the other; returns the layer with what became of each.

    A row of `feedback`, or of the file that it names, has the `prompt`, or the conversation as `messages`; the `answer`
    that was given; and one of `edit`, the answer as it should have been, `prefer`, a better one, and `reward`, a number
    from -1 to 1. `prompt` is text as `generate` takes it, with `chat` or without. The layer is a copy of `layer`, or a
    fresh one, which takes a minute to be made, and goes on from there: nothing is replayed of an earlier call.

    Raises UserError, before anything is learned, on rows that cannot be used, a config of another kind, and a layer of
    another model.
    """
    refuse_other_base(base)
    config = config_of(config, LearnConfig)
    if layer is not None:
        refuse_other_layer(layer, base)
    rows = _Reader(base, config, chat).all(feedback)
    own = fresh_layer(base) if layer is None else copy.deepcopy(layer)
    learner = Learner(own.to("cpu"), head_alone(base.head), config)
    told = []
    with meter("feedback", len(rows), "rows") as bar:
        for number, row in enumerate(rows, 1):
            entry = _entry(number, row.lesson(base, learner.layer, config))
            with _one_thread():
                outcome = learner.apply(entry)
            assert outcome is not None
            told.append(_told(row.kind, outcome))
            bar.advance(1)
    return learner.layer.to(base.device), LearnReport(tuple(told))


@dataclass(frozen=True, repr=False)
class LearnReport(Report):
    """What became of feedback: of each row its number from 1, its `kind`, whether it was learned from (`applied`).

    `published` tells whether the layer changed by it, `reason` why not. `kl_step` and `kl_base` are the exact KL of the
    update to the layer before and to the frozen model, in nats a token, None where there was no update; `loss_before`
    and `loss_after` are on the rows that are kept to measure by, None where there are none.
    """

    lessons: Sequence[Mapping[str, Any]]
    curve = ()

    @property
    def title(self) -> str:
        """One sentence of result."""
        applied, published = (sum(lesson[name] for lesson in self.lessons) for name in ("applied", "published"))
        told = f"{applied:,} of {len(self.lessons):,} rows of feedback were learned from"
        return f"{told}; the layer changed {published:,} times"

    @property
    def table(self) -> Table:
        """A row for each one of the feedback."""
        columns = [
            Column("feedback", ("feedback",), "{:,}"),
            Column("kind", ("kind",), words=True),
            Column("KL of the step", ("kl_step",), "{:.3f}"),
            Column("to the base", ("kl_base",), "{:.3f}"),
            Column("loss before", ("loss_before",), "{:.3f}"),
            Column("after", ("loss_after",), "{:.3f}"),
            Column("what came of it", ("became",), words=True),
        ]
        became = ["a new version" if one["published"] else one["reason"] for one in self.lessons]
        rows = [{**one, "became": text} for one, text in zip(self.lessons, became, strict=True)]
        return Table("", "KL and losses in nats a token; losses of the rows that are kept to measure by", columns, rows)

    def numbers(self) -> list[Mapping[str, Any]]:
        """What became of each row."""
        return list(self.lessons)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As the process that learns beside a server has it: sums of several threads have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _told(kind: Kind, outcome: Outcome) -> Mapping[str, Any]:
    return {
        "feedback": outcome.number,
        "kind": kind,
        "version": outcome.version,
        "applied": outcome.applied,
        "published": outcome.published,
        "reason": outcome.reason,
        "kl_step": outcome.step_kl,
        "kl_base": outcome.base_kl,
        "loss_before": outcome.loss_before,
        "loss_after": outcome.loss_after,
    }


@dataclass(frozen=True)
class _Row:
    """A row as token ids: the answer and, but of a reward, a better one; each with its end token."""

    kind: Kind
    prompt: list[int]
    answer: list[int]
    better: list[int]
    reward: float

    def lesson(self, base: Frozen, layer: MoEBiasLayer, config: LearnConfig) -> Lesson:
        """On the layer's support, by one pass of the frozen model over the prompt, and one over each answer."""
        asked = extended(base.model, None, self.prompt)
        answer = _features(base, asked, self.answer, layer)
        if self.kind == "reward":
            return reward_lesson(answer, self.reward, config.lesson_tokens)
        return pair_lesson(_features(base, asked, self.better, layer), answer, config.lesson_tokens)


def _features(base: Frozen, asked: Prefix, answer: list[int], layer: MoEBiasLayer) -> Features:
    hidden_TD = extended(base.model, asked, [*asked.tokens, *answer[:-1]]).hidden[len(asked) - 1 :]
    return answer_features(base.head, hidden_TD, torch.tensor(answer), layer.support_or_all())


def _entry(number: int, lesson: Lesson) -> Entry:
    """As a journal gives it back, tensors in memory of their own included."""
    tensors = {name: tensor.clone() for name, tensor in lesson.tensors().items()}
    return Entry(number, LESSON, {"reward": lesson.reward}, tensors, 0)


@dataclass(frozen=True)
class _Reader:
    """Reads rows of feedback, all of them before any is learned."""

    base: Frozen
    config: LearnConfig
    chat: bool

    def all(self, feedback: object) -> list[_Row]:
        """Raises UserError, naming the row, on the first that cannot be used, and where there is none."""
        if self.chat and not self.base.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; pass chat=False for plain text")
        if isinstance(feedback, str | Path):
            rows, source = read_rows(str(feedback), "train"), str(feedback)
        else:
            rows, source = list(rows_in_memory(feedback, ARGUMENT)), ARGUMENT
        if not rows:
            raise UserError(f"{ARGUMENT} is empty; give at least one row")
        return [self._row(row, f"row {number} of {source}") for number, row in enumerate(rows, 1)]

    def _row(self, row: object, where: str) -> _Row:
        if not isinstance(row, Mapping):
            raise UserError(f"{where} is not an object with columns but {shown(row)}")
        kind = _kind(row, where)
        conversation = self._asked(row, where)
        prompt = encode_prompt(conversation, self.base.tokenizer)
        if not prompt:
            raise UserError(f"{where} makes a prompt without tokens; leave the row out")
        answer = self._answer(row, "answer", conversation, where)
        better = [] if kind == "reward" else self._answer(row, kind, conversation, where)
        longest = len(prompt) + max(len(answer), len(better))
        room = length_limit(self.base.model, longest)
        if longest > room:
            raise UserError(f"{where} has {longest:,} tokens, and the model reads {room:,}; leave the row out")
        with _said_of(where):
            if kind == "reward":
                return _Row(kind, prompt, answer, better, _reward(row["reward"]))
            pair_parts(better, answer, self.config.lesson_tokens)
            return _Row(kind, prompt, answer, better, 0.0)

    def _asked(self, row: Mapping[str, Any], where: str) -> Conversation:
        given = [name for name in ("prompt", "messages") if not is_missing(row.get(name))]
        if len(given) != 1:
            raise UserError(f"{where} has {' and '.join(given) or 'neither prompt nor messages'}; give one of the two")
        if given == ["prompt"]:
            turn = {"role": "user", "content": text_of(row["prompt"], f"{where}: prompt")}
            return Conversation((turn,), "", is_chat=self.chat)
        return Conversation(tuple(_messages(row["messages"], f"{where}: messages")), "")

    def _answer(self, row: Mapping[str, Any], name: str, conversation: Conversation, where: str) -> list[int]:
        if is_missing(row.get(name)):
            raise UserError(f"{where} has no {name}; give its text")
        text, tokenizer = text_of(row[name], f"{where}: {name}"), self.base.tokenizer
        if not text.strip():
            raise UserError(f"{where}: {name} is empty; give its text")
        ends = answer_ends(self.base.model, tokenizer, conversation.is_chat)
        own = [token for token in end_of_turn(conversation, tokenizer) if token in ends]
        return [*tokenizer(text, add_special_tokens=False).input_ids, *(own or ends)[:1]]


def _kind(row: Mapping[str, Any], where: str) -> Kind:
    given = [kind for kind in KINDS if not is_missing(row.get(kind))]
    if len(given) != 1:
        raise UserError(f"{where} has {' and '.join(given) or 'none'} of edit, reward and prefer; give one of them")
    return given[0]


def _reward(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise UserError(f"`reward` is {named(given)}; give a number from -1 to 1")
    refuse_no_reward(given)
    return float(given)


def _messages(given: object, where: str) -> list[Message]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UserError(f"{where} is not a list of messages but {shown(given)}")
    messages = [message_of(message, f"{where}, message {number}") for number, message in enumerate(given, 1)]
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where} ends with a turn of the assistant; give it as answer, and the turns before it here")
    return messages
