"""Whether an answer falls into a loop, and how much of it is new: read off its text, which every run keeps.

    loops        the text, white space left out, ends in a block of characters that stands there at least
                 4 times in a row and takes at least 64 characters together
    distinct-4   different runs of 4 words over all runs of 4 words; 1 where there are fewer than 4 words

Likeliest continuations repeat themselves, and each repetition makes the next one likelier (arXiv 1904.09751):
likelihood on given text does not show it. distinct-4 is one less the seq-rep-4 of arXiv 1908.04319, on words in
place of tokens, which a server does not tell. A word is a run of letters, a single ideograph, or any other single
character but white space, so that 500000 is six words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REPEATS = 4
LOOP_CHARACTERS = 64
READ_CHARACTERS = 8_000
"""Loops are looked for in so much of the end, which bounds the time; a block is then a fourth of it at most."""
NGRAM = 4
_WORD = re.compile(r"[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|\S")


@dataclass(frozen=True)
class Repetition:
    """Whether an answer ends in a loop, and its distinct-4 from 0 to 1."""

    loops: bool
    distinct: float


def repetition_of(text: str) -> Repetition:
    """Both measures of an answer."""
    return Repetition(loops(text), distinct(text))


def loops(text: str) -> bool:
    """Whether the text ends in a block that is repeated, as the file's docstring defines it."""
    backwards = "".join(text.split())[: -READ_CHARACTERS - 1 : -1]
    matches = _matches_of_start(backwards)
    # What agrees with itself `period` places on, is one block and the blocks before it.
    return any(
        period + match >= max(REPEATS * period, LOOP_CHARACTERS) for period, match in enumerate(matches) if period
    )


def distinct(text: str) -> float:
    """distinct-4, as the file's docstring defines it."""
    words = _WORD.findall(text)
    ngrams = list(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def _matches_of_start(text: str) -> list[int]:
    """At each place how many characters from there on are those that the text begins with; the Z-algorithm."""
    matches = [0] * len(text)
    left = right = 0  # the match that reaches furthest, which tells what is to be found inside it
    for place in range(1, len(text)):
        match = min(matches[place - left], right - place) if place < right else 0
        while place + match < len(text) and text[match] == text[place + match]:
            match += 1
        matches[place] = match
        if place + match > right:
            left, right = place, place + match
    return matches
