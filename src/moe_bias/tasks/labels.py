"""Texts with labels: the prompts that ask for a label, and the token by which each label is told from the others.

A label is chosen by the first token of its answer, the one that follows the prompt; so no two labels may begin with
the same token. Where the prompt is plain text that does not end in white space, an answer begins with a space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moe_bias.mistakes import UserError, shown
from moe_bias.tasks.columns import rows_in_memory
from moe_bias.tasks.conversations import Conversation, ask, encode
from moe_bias.tasks.rows import read_rows, text_of

FEWEST_OF_A_LABEL = 2
"""Labelled texts of each label in every draw: with one there is nothing to cross-validate."""
CONTENT_FREE = ("N/A", "[MASK]", "")
"""Inputs without content, as Zhao et al. take them (arXiv 2102.09690)."""


@dataclass(frozen=True)
class LabelledText:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class Asking:
    """How a label is asked for: a template with {text} and {labels} in it, and whether it goes into a chat."""

    template: str
    labels: tuple[str, ...]
    is_chat: bool

    def conversation(self, text: str, label: str) -> Conversation:
        """The prompt of a text, and the label as its answer."""
        listed = self.template.replace("{labels}", ", ".join(self.labels))
        question = listed.replace("{text}", text)
        opening = "" if self.is_chat or question[-1:].isspace() else " "
        return ask(question, opening + label, self.is_chat)


def read_labelled(
    rows: str | Sequence[object], split: str, text_column: str, label_column: str
) -> tuple[list[LabelledText], str]:
    """The texts of a file, a Hub data set or rows in memory, and what they are called.

    Raises UserError, naming row and column, where one is missing or no text, and where a text stands there twice.
    """
    source = rows if isinstance(rows, str) else "the rows"
    found = read_rows(rows, split) if isinstance(rows, str) else rows_in_memory(rows, source)
    texts = []
    for number, row in enumerate(found, 1):
        where = f"row {number} of {source}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is {shown(row)}; give an object with `text_column` and `label_column`")
        for name, column in (("text_column", text_column), ("label_column", label_column)):
            if column not in row:
                raise UserError(f"{where} has no column {column!r}; name the one to take with `{name}`")
        texts.append(
            LabelledText(
                text_of(row[text_column], f"{text_column} in {where}"),
                text_of(row[label_column], f"{label_column} in {where}").strip(),
            )
        )
    _refuse_twice(texts, source)
    return texts, source


def labels_of(texts: Sequence[LabelledText], source: str) -> tuple[str, ...]:
    """The labels, sorted. Raises UserError where there are fewer than two, and on an empty one."""
    labels = tuple(sorted({text.label for text in texts}))
    if "" in labels:
        raise UserError(f"{source} has an empty label")
    if len(labels) < 2:
        raise UserError(f"{source} has one label, {labels[0]!r}: there is nothing to choose among")
    return labels


def label_tokens(asking: Asking, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """The first token of each label's answer. Raises UserError where two labels have the same one."""
    tokens: dict[int, str] = {}
    for label in asking.labels:
        example = encode(asking.conversation("", label), tokenizer, max_length)
        if example is None:
            raise UserError(f"the prompt without a text fills {max_length} tokens; raise `max_length`")
        first = example.completion_ids[0]
        if first in tokens:
            raise UserError(
                f"labels {tokens[first]!r} and {label!r} both begin with the token {tokenizer.decode([first])!r}, by "
                "which they cannot be told apart; give labels that begin otherwise, such as other words or letters"
            )
        tokens[first] = label
    return list(tokens)


def _refuse_twice(texts: Sequence[LabelledText], source: str) -> None:
    """A text in both parts would be learnt from and measured on."""
    text, times = Counter(text.text for text in texts).most_common(1)[0] if texts else ("", 0)
    if times > 1:
        raise UserError(f"{source} has the text {shown(text)} {times} times; keep one of them")
