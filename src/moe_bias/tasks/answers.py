r"""Where a completion states its answer: in `<answer>` tags, in a `\boxed{}`, or after the last "answer is"."""

from __future__ import annotations

import re

CLAUSE_END = re.compile(r"[,;.](?:\s|$)")
_STATED = re.compile(r"answer\**(?: is\b|:):?\**", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|framebox|fbox)\{|[{}]")
_MINUS = re.compile(r"[\u2212\ufe63\uff0d]|(?<![\w)\]}])[\u2010-\u2013](?=[\d.\\(])")
"""Unicode's minus signs, and its hyphens and dashes where they are the sign of a number."""
_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"


def with_plain_minus(text: str) -> str:
    """The text with `-` for every minus sign, which is what scorers read."""
    return _MINUS.sub("-", text)


def answer_place(completion: str) -> str | None:
    r"""The text in the last `<answer>` tags, in that the last `\boxed{}`, else what follows the last "answer is"."""
    text = last_tagged(completion)
    if text is None:
        text = completion
    for place in (last_boxed(text), stated_answer(text)):
        if place is not None:
            return place
    return None if text is completion else text


def stated_answer(completion: str) -> str | None:
    """All that follows the last "answer is" or "answer:", or None without one."""
    *before, last = _STATED.split(completion)
    return last if before else None


def last_tagged(completion: str) -> str | None:
    """What stands between the last `<answer>` and the `</answer>` after it, or None without a pair."""
    end = completion.rfind(_CLOSE_TAG)
    start = completion.rfind(_OPEN_TAG, 0, max(end, 0))
    return None if start < 0 else completion[start + len(_OPEN_TAG) : end]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, or other LaTeX for it, or None without one that is closed."""
    open_braces: list[int | None] = []  # where the text in a box begins; None for a brace of other kinds
    last: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace.group() != "}":
            open_braces.append(brace.end() if brace.group() != "{" else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, brace.start()
    return None if last is None else text[slice(*last)]
