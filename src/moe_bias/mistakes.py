"""What a user is told of a mistake: one sentence, however long or odd what was given.

A mistake is told apart from a fault of the program by who speaks of what. What the system says of a path that the
user named is a sentence (`system_errors_about`); so is whatever a parser or a loader says of a file that the user named
(`reading`, around calls of other people's code alone). Anything else keeps its traceback.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")

VALUE_LENGTH = 80
"""A value is shown with so many characters at most, its beginning and its end."""
SENTENCE_LENGTH = 2000
"""What even a sentence of many values never exceeds."""
LARGEST_DOCUMENT = 2**30
"""Bytes of a JSON document: no record, config or list of token ids is larger, while files of /proc say they are."""
SAME_CALL = "the same call"
AS_PAIRS = "pairs=True"
"""What the library's sentences call so, the command line has words of its own for (`commands.sources`)."""
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""", re.DOTALL)
_UNBROKEN = re.compile(rf"""[^\s'",;]{{{VALUE_LENGTH + 1},}}""")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class UserError(ValueError):
    """A user's mistake, told in one sentence: the command prints it and exits with 2. Long values are cut."""

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


class Interrupted(KeyboardInterrupt):
    """An interrupt with a sentence on what was saved: the command prints it and exits with 130."""


@contextmanager
def nothing_stays_without(output: object) -> Iterator[None]:
    """Where `output` is None an interrupt says that nothing stays, in place of where it was before it was removed."""
    try:
        yield
    except Interrupted as interrupt:
        if output is None:
            raise Interrupted(
                f"nothing of the run stays; give it an `output`, and {SAME_CALL} goes on after an interrupt"
            ) from interrupt
        raise


def shortened(sentence: str) -> str:
    """The sentence with each value in it cut: what is quoted, in brackets, or not broken by a space."""
    for cut in (_cut_quoted, _cut_bracketed, _cut_unbroken):
        sentence = cut(sentence)
    return _cut(sentence, SENTENCE_LENGTH)


def shown(value: object) -> str:
    """A value as a sentence names it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes down, a value nested too deep
        text = f"a {type(value).__name__} too large to be written here"
    return _cut(text)


def printable(text: str) -> str:
    """The text with what a terminal would obey, or cannot show, as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextmanager
def reading(what: str, *apart: type[Exception]) -> Iterator[None]:
    """Turns whatever is raised while a file that the user named is read into UserError: "WHAT cannot be read: ...".

    Errors of the types `apart` are left as they are. Only calls of other people's code belong into the block: a fault
    of ours would look like the user's.
    """
    try:
        yield
    except apart:
        raise
    except UserError:
        raise
    except Exception as error:  # parsers and loaders raise anything over a damaged file
        raise UserError(f"{what} cannot be read: {reason_of(error)}") from error


@contextmanager
def system_errors_about(named: Iterable[str]) -> Iterator[None]:
    """Turns what the system says of a path at, below or above one of those named, or of a full disk, into UserError."""
    try:
        yield
    except OSError as error:
        sentence = _system_sentence(error, named)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def read_text(path: Path, what: str) -> str:
    """A text file that the user named. Raises UserError, calling it `what`, where it cannot be read as UTF-8."""
    with reading(f"{what} {str(path)!r}"):
        size = os.stat(path).st_size
        if not path.is_file() or size == 0:  # files of /proc are of no size, and some of them have no end
            raise UserError(f"{what} {str(path)!r} {'is empty' if path.is_file() else 'is not a file'}")
        if size > LARGEST_DOCUMENT:
            raise UserError(f"{what} {str(path)!r} has {size:,} bytes; at most {LARGEST_DOCUMENT:,} can be read")
        return path.read_text(encoding="utf-8")


def read_json(path: Path, what: str, remedy: str = "") -> Any:
    """The JSON document in a file that the user named.

    Raises UserError, calling it `what`, where there is none: also where a key stands twice, of which one value would be
    lost, and where it is nested too deep to be read.
    """
    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(f"{what} {str(path)!r}", f"it is not JSON: {reason_of(error)}", remedy) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice")
        found[key] = value
    return found


def as_kind(kind: type[Kind], value: object, what: str, remedy: str = "") -> Kind:
    """A value of a document as a dataclass or mapping of this kind. Raises UserError naming the first field amiss."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = first_mistake(error)
        reason = f"{first.reason}, not {shown(first.value)}"
        raise damaged(what, f"{first.field}: {reason}" if first.field else reason, remedy) from error


@dataclass(frozen=True)
class Mistake:
    """The first thing that is wrong with values: where, as names from the outermost in, why, and what stands there.

    `place` is empty where it is several fields together; those then have their names in `among`. `kind` is pydantic's.
    """

    place: tuple[str, ...]
    kind: str
    reason: str
    value: object
    among: tuple[str, ...]

    @property
    def field(self) -> str:
        """The dotted field, empty where it is all of the document."""
        return ".".join(self.place)

    def of(self, name: str) -> str:
        """One sentence on it that calls the field `name`."""
        return f"{name} is {shown(self.value)}: {self.reason}"


def first_mistake(error: ValidationError) -> Mistake:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    return Mistake(
        place=tuple(map(str, first["loc"])),
        kind=first["type"],
        reason=f"{reason[0].lower()}{reason[1:]}",
        value=first["input"],
        among=tuple(first.get("ctx", {})),
    )


def damaged(what: str, reason: str, remedy: str = "") -> UserError:
    """The error to raise over a file that does not hold what it should."""
    return UserError(f"{what} is damaged: {reason}{'; ' if remedy else ''}{remedy}")


def reason_of(error: BaseException) -> str:
    """The first line of what an error says; its type too where that says nothing by itself."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ""
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror
    return said if said and not isinstance(error, LookupError) else f"{type(error).__name__} {said}".strip()


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt in whose course an error came up, which is then no fault of its own; else None."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


def _system_sentence(error: OSError, named: Iterable[str]) -> str | None:
    files = (error.filename, error.filename2)
    paths = [os.fsdecode(file) for file in files if isinstance(file, str | bytes | os.PathLike)]
    if error.errno in _NO_ROOM:
        return f"{shown(paths[0]) if paths else 'a file'} cannot be written: {reason_of(error)}; make room on the disk"
    names = {os.path.abspath(part) for word in named for part in _parts(word) if part and "\0" not in part}
    for path in paths:
        if any(_on_one_line(os.path.abspath(path), name) for name in names):
            return f"{shown(path)} cannot be used: {reason_of(error)}"
    return None


def _parts(word: str) -> Iterator[str]:
    """A word of the command line, what it gives an option, and what it lists."""
    yield word
    yield word.partition("=")[2]
    yield from word.split(",")


def _on_one_line(one: str, other: str) -> bool:
    """Whether one path is the other, or leads to it."""
    return os.path.commonpath([one, other]) in (one, other)


def _cut(text: str, length: int = VALUE_LENGTH) -> str:
    if len(text) <= length:
        return text
    kept = length - 3
    return f"{text[: kept - kept // 2]}...{text[-(kept // 2) :]}"


def _cut_quoted(text: str) -> str:
    return _QUOTED.sub(lambda found: _cut(found[0]), text)


def _cut_unbroken(text: str) -> str:
    return _UNBROKEN.sub(lambda found: _cut(found[0]), text)


def _cut_bracketed(text: str) -> str:
    """Lists and mappings, the outermost ones."""
    parts, depth, start, done = [], 0, 0, 0
    for place, letter in enumerate(text):
        if letter in "[{":
            start = place if depth == 0 else start
            depth += 1
        elif letter in "]}" and depth:
            depth -= 1
            if depth == 0:
                parts += [text[done:start], _cut(text[start : place + 1])]
                done = place + 1
    return "".join([*parts, text[done:]])
