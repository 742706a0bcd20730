"""Where a completion states its answer."""

from __future__ import annotations

import re

CLAUSE_END = re.compile(r"[,;.](?:\s|$)")
_STATED = re.compile(r"answer(?: is|:)", re.IGNORECASE)
_BOX = "\\boxed{"


def stated_answer(completion: str) -> str | None:
    """All that follows the last "answer is" or "answer:", or None without one."""
    *before, last = _STATED.split(completion)
    return last if before else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, or None without one that is closed."""
    before, box, rest = text.rpartition(_BOX)
    if not box:
        return None
    depth = 1
    for place, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:place]
    return last_boxed(before)
