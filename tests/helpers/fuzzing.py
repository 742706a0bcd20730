"""What fuzzers share: odd values, ways to damage a file, and a command run within a time limit and looked at."""

import contextlib
import copy
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from moe_bias.cli import main
from moe_bias.mistakes import SENTENCE_LENGTH, VALUE_LENGTH

LONG = "long" * 2000
ODD_TEXTS = [
    *(
        "",
        " ",
        "-",
        "--",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "none",
        "null",
        "true",
        "[]",
        "{}",
        "{",
        "a=b",
        ",",
        "a,,b",
    ),
    *("/", "..", ".", "~", "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/kmsg", "/proc/version", "rows.jsonl/x"),
    *("model", "adapter", "rows.jsonl", "nowhere", "caf\udce9", "\udcff\udcfe", "zero\0byte", "\ud800", LONG),
    *(
        "a/" * 2500,
        "x" * 300,
        "é" * 200,
        "日本語",
        "\x1b[31mred",
        "[bold]b[/b]",
        "line\nline",
        "%s%n",
        "auto:0",
        "auto:-1",
    ),
    *(f"auto:{10**30}", "auto:" + "9" * 5000, "1/0", "0/0", "1/" + "9" * 5000, str(2**31), str(2**63), str(2**64)),
    *(
        str(10**30),
        "9" * 5000,
        "-" + "9" * 50,
        "1e30",
        "1e308",
        "-1e308",
        "1e-400",
        "0x10",
        "1_000",
        "٣",
        "1.5",
        "1KiB",
    ),
    *("99999999999TiB", "-5GiB", "cuda:99", "meta", "http://[::1", "http://127.0.0.1:9", "module:function", "(" * 200),
]
"""Words as people mistype them and as others attack with; those without a zero byte can stand on a command line."""


def nested(depth: int) -> str:
    """JSON nested so deep."""
    return "[" * depth + "]" * depth


ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *("", "text", "1", LONG, "\ud800", "zero\0byte", [], [0], [True], [-1], [0, 0], [[1]], ["a"], {}, {"a": 1}, [None]),
    list(range(3000)),
    {"a": {"b": {"c": [1, 2, {"d": None}]}}},
]
"""Values that JSON can hold, or that Python reads as JSON."""


class Hang(BaseException):
    """A case took longer than its limit; no `except Exception` takes it for its own."""


@dataclass(frozen=True)
class Ending:
    """How a command ended: its exit code and what it wrote."""

    code: int
    output: str
    errors: str

    @property
    def sentence(self) -> str:
        """The one line of a refusal."""
        return next(line for line in self.errors.splitlines() if line.startswith("moe-bias: "))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after so long."""

    def stop(*_: object) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ended(words: list[str], seconds: float = 20.0) -> Ending:
    """The command in this process, its output going to a terminal that knows ASCII alone."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), within(seconds):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    output, errors = (stream.buffer.getvalue().decode("ascii") for stream in streams)
    return Ending(code, output, errors)


def look_at(ending: Ending) -> None:
    """Raises AssertionError unless the command did what it was told, or said in one sentence why not."""
    assert ending.code in (0, 2), ending
    assert "Traceback" not in ending.errors, ending.errors[-2000:]
    if ending.code == 2:
        lines = [line for line in ending.errors.splitlines() if line.startswith("moe-bias: ")]
        assert len(lines) == 1, ending.errors[-2000:]
        assert len(lines[0]) <= SENTENCE_LENGTH + 100, lines[0]
        assert re.search(rf"[^\s.]{{{VALUE_LENGTH + 1},}}", lines[0].replace("\\", " ")) is None, lines[0]


def run_cases(number: int, seed: int, case: Callable[[Random], list[str]], seconds: float = 20.0) -> list[int]:
    """Runs so many cases, each drawn with a seed of its own; returns their exit codes.

    `case` prepares files and gives the words of the command. A failure names the seed that draws it again.
    """
    codes = []
    for place in range(seed, seed + number):
        words = case(Random(place))
        try:
            ending = ended(words, seconds)
            look_at(ending)
        except (Exception, Hang) as error:
            error.add_note(f"case {place}: {[word[:200] for word in words]}")
            raise
        codes.append(ending.code)
    return codes


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON document: the keys that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


def damaged_json(random: Random, document: Any) -> Any:
    """The document with one or two of its values replaced, removed, doubled or renamed."""
    document = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 2))):
        inner = [place for place in places(document) if place]
        if not inner:
            break
        *way, last = random.choice(inner)
        holder = document
        for key in way:
            holder = holder[key]
        act = random.randrange(4)
        if act == 0:
            del holder[last]
        elif act == 1 and isinstance(holder, dict):
            holder[random.choice(("self", "cls", "", "extra", LONG))] = holder.pop(last)
        else:
            holder[last] = copy.deepcopy(random.choice(ODD_VALUES))
    return document


def written_json(random: Random, document: Any) -> bytes:
    """The document as a file, whole or cut, nested too deep, of another encoding or no text at all."""
    text = json.dumps(damaged_json(random, document))
    act = random.randrange(12)
    if act == 0:
        return text.encode()[: random.randrange(len(text))]
    if act == 1:
        return text.encode("utf-16")
    if act == 2:
        return random.choice((nested(100_000), '{"a":' * 50_000, "9" * 5000, "", "null", "[]", '"text"')).encode()
    return flipped(random, text.encode()) if act == 3 else text.encode()


def flipped(random: Random, content: bytes, first: int | None = None) -> bytes:
    """The bytes with a few bits flipped, among the first ones if so asked."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        if changed:
            changed[random.randrange(min(len(changed), first or len(changed)))] ^= 1 << random.randrange(8)
    return bytes(changed)


def damaged_tensors(random: Random, content: bytes) -> bytes:
    """A safetensors file that is cut, flipped in its header or its numbers, or says another length of its header."""
    act = random.randrange(5)
    if act == 0:
        return content[: random.randrange(len(content))]
    if act == 1:
        return random.choice((0, 1, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if act == 2:
        return content + b"more"
    header = 8 + int.from_bytes(content[:8], "little")
    return flipped(random, content, header if act == 3 else None)


def replace_file(path: Path, content: bytes) -> None:
    """Writes the file; a folder or link in its place makes way."""
    if path.is_symlink():
        path.unlink()
    path.write_bytes(content)
