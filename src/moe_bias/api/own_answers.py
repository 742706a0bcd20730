"""Answers that a model itself gives to the prompts of rows, as texts to train on: on its own ground, not on a person's.

What speculative decoding verifies is text of the target, with a few tokens of the draft after it. Answers are sampled
at a temperature, each with random numbers of its own row, so that they do not depend on the batches. In a folder they
are kept line by line, and a call that was cut short goes on there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from moe_bias.api.arguments import refuse_other_base, refuse_other_layer
from moe_bias.api.data import HasTexts, Rows, Texts
from moe_bias.features.fingerprint import backbone_hash
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.limits import LONGEST_ANSWER
from moe_bias.mistakes import Interrupted, UserError, as_kind, damaged, reason_of
from moe_bias.progress import meter, say, text_console
from moe_bias.records import write_whole
from moe_bias.rollout.answers import AnswerChoices, sampled_answers
from moe_bias.tasks.conversations import Conversation, answer_ends, encode_prompt
from moe_bias.training.batches import mixed_seed
from moe_bias.training.problems import policy_of

FILE = "own-answers.jsonl"
_MADE_WITH = "made_with"


@dataclass(frozen=True)
class OwnAnswers(HasTexts):
    """Answers of a model to the prompts of rows, which `extract` takes as rows; `cut` of them met the token limit."""

    texts: Texts
    cut: int = 0


@dataclass(frozen=True)
class _Line:
    """An answer as it is kept: its conversation's number, from 0, and whether it ended by itself."""

    number: int
    text: str
    finished: bool


def own_answers(
    base: Frozen,
    rows: Rows,
    layer: MoEBiasLayer | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    split: str = "train",
    batch_size: int = 16,
    folder: str | Path | None = None,
) -> OwnAnswers:
    """Samples an answer of a model, under a layer where there is one, to the prompt of each row, for `extract`.

    `rows` are those of `extract`, whose own answers are not looked at; `batch_size` prompts are answered at once. In
    `folder` the answers are kept, and an interrupted call goes on there. Raises UserError on rows and values that
    cannot be used, and on a folder with other answers; Interrupted on Ctrl-C.
    """
    refuse_other_base(base)
    if layer is not None:
        refuse_other_layer(layer, base)
    if not temperature >= 0:
        raise UserError(f"`temperature` is {temperature}; give 0, which is greedy, or more")
    for name, value, most in (("max_new_tokens", max_new_tokens, LONGEST_ANSWER), ("batch_size", batch_size, 2**20)):
        if not 1 <= value <= most:
            raise UserError(f"`{name}` is {value}; give a number from 1 to {most:,}")
    choices = AnswerChoices(1, temperature, 1.0, max_new_tokens, [])
    texts = rows.texts if isinstance(rows, HasTexts) else Texts.of(rows, split)
    return sampled_texts(base, texts, layer, choices, seed, batch_size, None if folder is None else Path(folder))


def sampled_texts(
    base: Frozen,
    texts: Texts,
    layer: MoEBiasLayer | None,
    choices: AnswerChoices,
    seed: int,
    batch_size: int,
    folder: Path | None,
    console: Console | None = None,
) -> OwnAnswers:
    """The texts with a model's own answers in place of theirs; see `own_answers`. Stops are the model's own."""
    prompts = [_prompt(conversation, base) for conversation in texts.conversations]
    kept = _Kept(folder, _made_with(base, layer, prompts, choices, seed))
    found = kept.read(len(prompts))
    if found:
        say(console or text_console(), f"{len(found):,} of {len(prompts):,} answers found in {kept.path}")
    try:
        for lines in _missing(base, texts.conversations, prompts, layer, choices, seed, batch_size, found):
            kept.add(lines)
            found |= {line.number: line for line in lines}
    except KeyboardInterrupt as interrupt:
        raise Interrupted(f"{len(found):,} of {len(prompts):,} answers are sampled") from interrupt
    conversations = [
        replace(conversation, completion=found[number].text, reply=None, is_sampled=True)
        for number, conversation in enumerate(texts.conversations)
    ]
    cut = sum(not line.finished for line in found.values())
    return OwnAnswers(replace(texts, conversations=conversations, source=f"own answers to {texts.source}"), cut)


def _prompt(conversation: Conversation, base: Frozen) -> list[int]:
    ids = encode_prompt(conversation, base.tokenizer)
    if not ids:
        raise UserError(f"{conversation.where} has no prompt to answer; leave the row out")
    return ids


def _missing(
    base: Frozen,
    conversations: Sequence[Conversation],
    prompts: Sequence[list[int]],
    layer: MoEBiasLayer | None,
    choices: AnswerChoices,
    seed: int,
    batch_size: int,
    found: Mapping[int, _Line],
) -> Iterator[list[_Line]]:
    """Batch by batch, the answers that are not there yet, to prompts of like length."""
    todo = sorted((number for number in range(len(prompts)) if number not in found), key=lambda n: len(prompts[n]))
    policies = [policy_of(layer, base.head)]
    with meter("own answers", len(todo), "answers") as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            ends = answer_ends(base.model, base.tokenizer, conversations[batch[0]].is_chat)
            seeds = [mixed_seed(seed, number) for number in batch]
            asked = [prompts[number] for number in batch]
            answers = sampled_answers(
                base.model, base.head, asked, policies, replace(choices, stop_ids=ends), seeds, bar
            )
            yield [
                _Line(number, str(base.tokenizer.decode(answer.token_ids, skip_special_tokens=True)), answer.finished)
                for number, ((answer,),) in zip(batch, answers, strict=True)
            ]


@dataclass(frozen=True)
class _Kept:
    """The file of a folder that answers are kept in, or none; `made_with` is a digest of all that decides them."""

    folder: Path | None
    made_with: str

    @property
    def path(self) -> Path | None:
        return None if self.folder is None else self.folder / FILE

    def read(self, count: int) -> dict[int, _Line]:
        """The whole lines by number. Raises UserError on a damaged file and on one of other answers."""
        if self.path is None:
            return {}
        if not self.path.is_file():
            write_whole(self.path, (json.dumps({_MADE_WITH: self.made_with}) + "\n").encode())
            return {}
        whole = [line for line in self.path.read_bytes().split(b"\n")[:-1] if line]
        try:
            first, *rows = [json.loads(line) for line in whole]
            lines = as_kind(list[_Line], rows, f"file {str(self.path)!r}")
        except (ValueError, RecursionError) as error:
            raise damaged(f"file {str(self.path)!r}", reason_of(error)) from error
        if first != {_MADE_WITH: self.made_with} or any(not 0 <= line.number < count for line in lines):
            raise UserError(
                f"{str(self.path)!r} holds answers of another model or to other prompts; name another folder"
            )
        write_whole(self.path, b"".join(line + b"\n" for line in whole))
        return {line.number: line for line in lines}

    def add(self, lines: Sequence[_Line]) -> None:
        """Adds lines, at the file's end."""
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(b"".join(json.dumps(vars(line)).encode() + b"\n" for line in lines))


def _made_with(
    base: Frozen, layer: MoEBiasLayer | None, prompts: Sequence[list[int]], choices: AnswerChoices, seed: int
) -> str:
    digest = hashlib.sha256(backbone_hash(base.model).encode())
    for tensor in () if layer is None else layer.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    told = [prompts, choices.temperature, choices.max_new_tokens, seed]
    digest.update(json.dumps(told).encode())
    return digest.hexdigest()
