r"""Whether a mathematical answer is the gold one, by math-verify over sympy.

math-verify is given what it does not read in forms that it does: `<answer>` tags and GSM8K's last line "#### 72" as
a `\boxed{}`, numbers in text (`\text{082}`), a full stop in a box, 1e-05, a base in words. Three things
that it takes no notice of are compared here: units where both answers have one that sympy knows (6 m is not 6 cm but
is 600 cm), bases where both name one, and how far numbers may differ that are very small or very large.

This runs in a process of its own (`grading_worker`), under a time limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from math import isclose, isfinite
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Expr, Float
from sympy.physics import units
from sympy.physics.units import Dimension
from sympy.physics.units.systems.si import SI

from moe_bias.tasks.answers import last_boxed, last_tagged, stated_answer, with_plain_minus
from moe_bias.tasks.verdict import Verdict, failed, judged

_BASES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "thirteen": "13",
    "fourteen": "14",
    "fifteen": "15",
    "sixteen": "16",
}
_OTHER_BOX = re.compile(r"\\(?:framebox|fbox)\{")
_SPACED_THOUSANDS = re.compile(r"(?<=\d),\\!(?=\d{3})")
_STYLED_NUMBER = re.compile(r"\\(?:text|math)[a-z]*\{\s*\(?\s*(-?\d[\d,.]*)\s*\)?\s*\}")
_BARE_TRUTH = re.compile(r"(?<=\\boxed\{)\s*(true|false)\s*(?=\})", re.IGNORECASE)
_STOP_IN_A_BRACE = re.compile(r"(?<=[\d)}])\.(?=\s*\})")
_STYLED_BASE = re.compile(
    r"_\{\s*\\(?:text|math)[a-z]*\{\s*(?:base\s*\}\s*(\d+)\s*\}|(?:base\s*)?([a-z]+|\d+)\s*\}\s*\})"
)
_PLAIN_UNIT = re.compile(r"(?<=[\d}])\s+([A-Za-z][A-Za-z/^\d²³ ]*)$")
_WITH_E = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?[eE][-+]?\d{1,3})(?![\w.]*\w)")
_MOST_WITH_E = 20
"""The last ones of a text are looked at: 3,000 times 1e999, written out, keep math-verify busy for minutes."""
_POWER_OF_TEN = re.compile(
    r"(?<![\w.,^/{})*×·+-])(?<![*×·+/-]\s)(?<!\\times\s)(?<!\\cdot\s)"
    r"(-?)(?:(\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|[×·*x])\s*)?10\s*(?:\^|\*\*)\s*"
    r"(?:\{\s*(-?\d{1,3})\s*\}|\(\s*(-?\d{1,3})\s*\)|(-?\d{1,3}))(?!\s*[-+*/^×·(\\\d])"
)
"""A number that stands alone; within a calculation it is no answer."""
_BASED = re.compile(r"(?<![\w.])(-?[0-9A-Za-z]+)_(?:\{\s*(\d{1,2})\s*\}|(\d{1,2}))(?!\w)")
_LAST_LINE = re.compile(r"####[ \t]*([^\n]+?)\s*\Z")
_STYLE = re.compile(r"\\(?:text|math)[a-z]*|\\(?:mbox|rm|operatorname)|\\[,;:! ]|[{}$~]|\\[()\[\]]")
_PHRASE = re.compile(r"(?:(?<=[\d)\s])|^)[A-Za-z][A-Za-z/^\d²³ ]*$")
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_NAMES = {"min": "minute", "sec": "second", "hr": "hour", "hrs": "hour", "lb": "pound", "lbs": "pound"}
_SMALL, _SMALL_DIFFERENCE = 1e-3, 1e-5
"""Of numbers below the former, math-verify's six decimals are less than four digits; they may differ by this share."""
_LAST_DIGITS = 1e-14
"""The share by which large numbers differ where one was calculated in floats, as 6.02 * 10^23 is."""


def load(case: Mapping[str, Any]) -> None:
    """Has math-verify load what it loads at its first use."""
    _warm()


@cache
def _warm() -> None:
    verify(_read("1/2", True), _read("$0.5$", True), timeout_seconds=None)


def verdicts(case: Mapping[str, Any]) -> Iterator[Verdict]:
    """The verdicts on the completion of a case, stage by stage."""
    yield failed("bad gold")
    gold = read_gold(case["gold"])
    if gold is None:
        return
    yield failed("timed out")
    answers = [
        Answer(text, tuple(_read(text, gold.has_units_cut)), gold.has_units_cut)
        for text in _places(_plain(case["completion"]))
    ]
    readable = [answer for answer in answers if answer.is_readable]
    if not readable:
        yield failed("unparseable", answers[0].text)
        return
    yield failed("timed out", readable[0].text)
    right = next((answer for answer in readable if _is_equal(gold, answer)), None)
    yield judged(right is not None, (right or readable[0]).text)


@dataclass(frozen=True)
class Unit:
    """A unit as a multiple of sympy's own of its dimension."""

    factor: Any
    dimension: Any


@dataclass(frozen=True)
class Answer:
    """What math-verify made of a text: expressions, and the text that it read them in."""

    place: str
    parsed: tuple[Any, ...]
    has_units_cut: bool = True

    @property
    def is_readable(self) -> bool:
        """Whether there is more than text."""
        return any(not isinstance(part, str) for part in self.parsed)

    @property
    def text(self) -> str | None:
        """The text that was read."""
        return next((part for part in self.parsed if isinstance(part, str)), None)

    @property
    def base(self) -> tuple[str, str] | None:
        """The digits and the base of a number that names one, all of a box or last in a line."""
        is_boxed = last_boxed(self.place) is not None
        end = _end(self.place).strip(" $")
        found = [_BASED.fullmatch(end)] if is_boxed else list(_BASED.finditer(end))
        if not found or found[-1] is None:
            return None
        digits, base = found[-1][1].lower(), found[-1][2] or found[-1][3]
        is_number = all(int(digit, 36) < int(base) for digit in digits.lstrip("-"))
        return (digits.lstrip("0"), base) if is_number else None

    @property
    def unit(self) -> Unit | None:
        """The unit after the text that was read, or None."""
        end, text = _end(self.place), self.text or ""
        _, found, after = end.rpartition(text) if text else ("", "", "")
        return _unit(after if found and after.strip(" $}.") else end)


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Answer | None:
    """What math-verify makes of a gold answer, LaTeX or plain; None where that is no expression.

    It is read with its units cut off, or else as it stands: the c of a + b + c is none.
    """
    if not gold.strip():
        return None
    text = _plain(f"\\boxed{{{gold}}}")
    read = (Answer(text, tuple(_read(text, has_units_cut)), has_units_cut) for has_units_cut in (True, False))
    return next((answer for answer in read if answer.is_readable), None)


def _read(text: str, has_units_cut: bool) -> list[Any]:
    latex = NormalizationConfig(
        basic_latex=True, units=has_units_cut, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    configs = (LatexExtractionConfig(normalization_config=latex), ExprExtractionConfig())
    parsed: list[Any] = parse(text, configs, parsing_timeout=None)
    return parsed


def _places(completion: str) -> list[str]:
    """The texts to read an answer in; where it is marked off without a box, both in one and as it stands."""
    marked = last_tagged(completion)
    if marked is None and (last_line := _LAST_LINE.search(completion)):
        marked = last_line[1]
    if marked is None or last_boxed(marked) is not None:
        return [completion if marked is None else marked]
    stated = stated_answer(marked)
    return [f"\\boxed{{{(marked if stated is None else stated).strip()}}}", marked]


def _plain(text: str) -> str:
    """The text with its numbers in forms that math-verify reads."""
    text = _SPACED_THOUSANDS.sub("", _OTHER_BOX.sub(r"\\boxed{", with_plain_minus(text)))
    text = _STYLED_BASE.sub(_base_in_digits, text)
    text = _STOP_IN_A_BRACE.sub("", _STYLED_NUMBER.sub(r"\1", text))
    text = _BARE_TRUTH.sub(r"\\text{\1}", text)
    text = _with_styled_unit(text)
    for number in reversed(list(_WITH_E.finditer(text))[-_MOST_WITH_E:]):
        text = text[: number.start()] + format(Decimal(number[1]), "f") + text[number.end() :]
    if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")):
        return text
    return _POWER_OF_TEN.sub(lambda match: f"${_in_latex(*match.groups())}$", text)


def _with_styled_unit(text: str) -> str:
    """The text with a unit in its box as LaTeX's text, which math-verify leaves out; without, h is a factor of km/h."""
    boxed = last_boxed(text) or ""
    phrase = _PLAIN_UNIT.search(boxed)
    if phrase is None or _unit(phrase[1]) is None:
        return text
    before, _, after = text.rpartition(boxed)
    return f"{before}{boxed[: phrase.start()]}\\text{{ {phrase[1]}}}{after}"


def _base_in_digits(match: re.Match[str]) -> str:
    base = match[1] or match[2]
    return f"_{{{_BASES.get(base, base)}}}"


def _in_latex(sign: str, factor: str | None, *powers: str | None) -> str:
    power = f"10^{{{next(filter(None, powers))}}}"
    return sign + (power if factor is None else f"{factor} \\times {power}")


def _is_equal(gold: Answer, answer: Answer) -> bool:
    if gold.base and answer.base:
        return gold.base == answer.base
    wanted, found = gold.unit, answer.unit
    if wanted is not None and found is not None and wanted != found:
        return _is_equal_in_units(gold, wanted, answer, found)
    if _has_float(gold) or _has_float(answer):  # what is exact is compared exactly, however large
        value, found_value = _number(gold), _number(answer)
        if value and found_value and "%" not in gold.place + answer.place:
            difference = abs(value - found_value) / abs(value)
            if difference < _LAST_DIGITS:
                return True
            if abs(value) < _SMALL and difference > _SMALL_DIFFERENCE:
                return False
    return bool(verify(list(gold.parsed), list(answer.parsed), timeout_seconds=None))


def _is_equal_in_units(gold: Answer, wanted: Unit, answer: Answer, found: Unit) -> bool:
    """Whether two numbers are the same quantity."""
    if not SI.get_dimension_system().equivalent_dims(found.dimension, wanted.dimension):
        return False
    value, found_value = _number(gold), _number(answer)
    if value is None or found_value is None:
        return False
    return isclose(value * float(wanted.factor), found_value * float(found.factor), rel_tol=_SMALL_DIFFERENCE)


def _number(answer: Answer) -> float | None:
    """The value of a single real number, as far as a float can hold it."""
    first = answer.parsed[0]
    if not (isinstance(first, Expr) and first.is_number and first.is_real):
        return None
    try:
        value = float(first)
    except OverflowError:
        return None
    return value if isfinite(value) else None


def _has_float(answer: Answer) -> bool:
    first = answer.parsed[0]
    return isinstance(first, Expr) and bool(first.atoms(Float))


def _end(place: str) -> str:
    """The text of an answer in its box, or the line in which a completion ends, or states it."""
    boxed = last_boxed(place)
    if boxed is not None:
        return boxed
    stated = stated_answer(place)
    lines = [line for line in (place if stated is None else stated).split("\n") if line.strip()]
    return lines[-1 if stated is None else 0] if lines else ""


@lru_cache(maxsize=4096)
def _unit(text: str) -> Unit | None:
    """The unit that a text ends with, such as "cm^2", "square meters" or "miles per hour"; None of other words."""
    phrase = _PHRASE.search(_STYLE.sub(" ", text).strip(" ."))
    if phrase is None:
        return None
    factor, dimension, power, is_divisor = 1, Dimension(1), 1, False
    spaced = phrase[0].replace("/", " per ").replace("²", "^2").replace("³", "^3")
    for word in re.sub(r"\s*\^\s*", "^", spaced).split():
        if word == "per":
            is_divisor = True
        elif word in _POWERS:
            power = _POWERS[word]
        else:
            name, _, own_power = word.partition("^")
            known = getattr(units, _NAMES.get(name, name.replace("metre", "meter").replace("litre", "liter")), None)
            if not isinstance(known, units.Quantity) or (own_power and not own_power.isdigit()):
                return None
            exponent = int(own_power or power) * (-1 if is_divisor else 1)
            factor *= SI.get_quantity_scale_factor(known) ** exponent
            dimension *= SI.get_quantity_dimension(known) ** exponent
            power = 1
    return Unit(factor, dimension)
