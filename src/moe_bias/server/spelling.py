"""An answer's text as it grows: whole letters only, and nothing of a text that ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "�"
"""What a tokenizer spells bytes with that are not yet a letter."""
_CONTEXT = 6
"""Tokens before that are spelled with a new one: some tokenizers put a space before whatever begins."""


class GrowingText:
    """The text of tokens that come one by one; it ends before any of `stops`, whose beginning is held back."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._spelled = 0
        self._waiting = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What the token adds to the text; nothing where it is part of a letter, or could be of a stop."""
        self._ids.append(token)
        start = max(self._spelled - _CONTEXT, 0)
        before = self._decode(self._ids[start : self._spelled])
        whole = self._decode(self._ids[start:])
        if whole.endswith(_BROKEN):
            return ""
        self._spelled = len(self._ids)
        return self._let_go(whole[len(before) :], final=False)

    def finish(self) -> str:
        """What was held back."""
        start = max(self._spelled - _CONTEXT, 0)
        rest = self._decode(self._ids[start:])[len(self._decode(self._ids[start : self._spelled])) :]
        self._spelled = len(self._ids)
        return self._let_go(rest, final=True)

    def _let_go(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        waiting = self._waiting + new
        ends = [place for place in (waiting.find(stop) for stop in self._stops) if place >= 0]
        if ends:
            self.stopped = True
            waiting, held = waiting[: min(ends)], 0
        else:
            held = 0 if final else max((_begun(waiting, stop) for stop in self._stops), default=0)
        out = waiting[: len(waiting) - held]
        self._waiting = waiting[len(waiting) - held :]
        self.text += out
        return out


def _begun(text: str, stop: str) -> int:
    """How many letters at the text's end are the beginning of the stop."""
    return next((count for count in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:count])), 0)
