"""What kind of token each id of a vocabulary is, from its text alone.

The classes, the first that fits:

    format       special tokens, white space, punctuation and brackets: nothing with a letter or a digit
                 that is no operator
    digit        decimal digits alone
    operator     signs of arithmetic and comparison alone (a hyphen is one of them)
    connective   a word of `CONNECTIVES`, in any case
    name         a capitalised word that starts with a space and of which the vocabulary has no form in small
                 letters: ' The' has one, so that it is no name
    other        all else: words, pieces of words

Parts of speech are not told apart: a token is often a piece of a word, and taggers bring models of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

CLASSES = ("digit", "operator", "connective", "format", "name", "other")
OPERATORS = frozenset("+-*/=<>^%×÷±≤≥≠≈∙·√−")
CONNECTIVES = frozenset(
    """
    and or but nor so yet then thus hence therefore because since as if unless while whereas although
    though however also next first second third finally when where after before until once instead
    otherwise moreover furthermore wait alternatively given suppose let which that
    """.split()  # noqa: SIM905
)
_WORD_STARTS = ("Ġ", "▁")
"""How tokenizers write the space that a token begins with."""


def vocabulary_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """(V,) int64: the place in `CLASSES` of each token id; ids that the tokenizer does not use are 'other'."""
    texts = token_texts(tokenizer, vocab_size)
    known, special = frozenset(texts), frozenset(tokenizer.all_special_ids)
    names = ["format" if number in special else token_class(text, known) for number, text in enumerate(texts)]
    names += ["other"] * (vocab_size - len(names))
    return torch.tensor([CLASSES.index(name) for name in names])


def token_texts(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """The text of each token id, the space before a word included, which some tokenizers leave out in decoding."""
    ids = range(min(len(tokenizer), vocab_size))
    written: Sequence[str] = tokenizer.convert_ids_to_tokens(list(ids))
    decoded: Sequence[str] = tokenizer.batch_decode([[token] for token in ids])
    return [
        f" {text.lstrip()}" if raw.startswith(_WORD_STARTS) and text.strip() else text
        for raw, text in zip(written, decoded, strict=True)
    ]


def token_class(text: str, vocabulary: AbstractSet[str]) -> str:
    """The class of one token's text; `vocabulary` are the texts of all tokens."""
    core = text.strip()
    if core.isdecimal():
        return "digit"
    if core and OPERATORS.issuperset(core):
        return "operator"
    if core.lower() in CONNECTIVES:
        return "connective"
    if not any(sign.isalnum() for sign in core):
        return "format"
    if text.startswith(" ") and core.isalpha() and core.istitle() and text.lower() not in vocabulary:
        return "name"
    return "other"
