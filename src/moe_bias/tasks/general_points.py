r"""GeneralPoints (2501.17161): reach a target with the numbers of a few cards, each used once.

As there, face cards count as 10 or as 11, 12 and 13, and cards can be dealt from black or red suits
only, so that a rule or a look can be held out. Departures: questions are words alone, two to four
cards, a target that may be drawn for each problem, and no two problems with the same numbers and
target, so that a part of them held out is new in its numbers.

Worked answers name the cards, then their numbers, then the steps, as the answers there do: what a number is
has to be read off its card before it can be used.

An answer is an expression, with or without `= target` after it, where a completion states its answer
(`answers.answer_place`), or in the last line that has one. It is correct where it uses the numbers and
+ - * / alone and equals the target in exact fractions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_bias.mistakes import UserError
from moe_bias.tasks.answers import CLAUSE_END, answer_place
from moe_bias.tasks.arithmetic import NotArithmetic, reachable, read
from moe_bias.tasks.grader import shared_grader
from moe_bias.tasks.task import Problem, too_few
from moe_bias.tasks.verdict import Verdict, failed, judged

Card = tuple[int, str]
SUITS: dict[str, tuple[str, ...]] = {
    "black": ("spades", "clubs"),
    "red": ("hearts", "diamonds"),
    "all": ("spades", "clubs", "hearts", "diamonds"),
}
FACES = {"10": "count as 10", "rank": "count as 11, 12 and 13"}
LARGEST_DRAWN_TARGET = 100
LONGEST_CLAUSE = 300
"""Characters; four numbers need fewer than thirty, and matching a long clause takes long."""
_RANKS = {1: "ace", 11: "jack", 12: "queen", 13: "king"}
_NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class GeneralPoints:
    """The card game with its options; `target` 0 draws one for each problem from the values in reach."""

    name: ClassVar[str] = "general_points"
    SMALL: ClassVar[Mapping[str, Any]] = {"cards": 3, "target": 0}
    """Options that leave a model of 135M parameters some hope."""

    cards: int = 4
    target: int = 24
    face: str | int = "10"
    suits: str = "all"

    def __post_init__(self) -> None:
        _check_choice("cards", self.cards, _NUMBER_WORDS)
        _check_choice("face", str(self.face), FACES)
        _check_choice("suits", self.suits, SUITS)
        if not isinstance(self.target, int) or self.target < 0:
            raise UserError(f"target = {self.target!r} is no target; give a number, or 0 to draw one for each problem")

    def problems(self, count: int, seed: int) -> list[Problem]:
        """`count` hands that have a solution, no two with the same numbers and target."""
        rng = random.Random(seed)
        found: dict[tuple[tuple[int, ...], int], Problem] = {}
        for _ in range(1000 + 50 * count):
            if len(found) == count:
                return list(found.values())
            hand = rng.sample([(rank, suit) for suit in SUITS[self.suits] for rank in range(1, 14)], self.cards)
            numbers = tuple(sorted(self._number(card) for card in hand))
            target = self._reached(numbers, rng)
            if target is not None and (numbers, target) not in found:
                found[numbers, target] = self._problem(hand, numbers, target)
        if len(found) == count:
            return list(found.values())
        raise too_few(self.name, len(found), count, "; more cards, or target = 0, give more")

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Verdicts on the equations in the completions."""
        pairs = zip(problems, completions, strict=True)
        return shared_grader().grade("general_points", [{**p.entry, "completion": text} for p, text in pairs])

    def _number(self, card: Card) -> int:
        return min(card[0], 10) if str(self.face) == "10" else card[0]

    def _reached(self, numbers: tuple[int, ...], rng: random.Random) -> int | None:
        values = reachable(numbers)
        if self.target:
            return self.target if self.target in values else None
        whole = sorted(int(v) for v in values if v.denominator == 1 and 1 <= v <= LARGEST_DRAWN_TARGET)
        return rng.choice(whole) if whole else None

    def _problem(self, hand: Sequence[Card], numbers: tuple[int, ...], target: int) -> Problem:
        solution = reachable(numbers)[target].text  # type: ignore[index]  # an int equals its Fraction
        gold = f"{solution} = {target}"
        read_off = ", ".join(str(self._number(card)) for card in hand)
        reading = f"The cards are {_named(hand)}. The numbers are {read_off}."
        worked = " ".join([reading, *read(solution).steps, f"The answer is {gold}."])
        return Problem(self._question(hand, target), gold, worked, {"numbers": list(numbers), "target": target})

    def _question(self, hand: Sequence[Card], target: int) -> str:
        return (
            f"You have {_NUMBER_WORDS[self.cards]} cards: {_named(hand)}. An ace counts as 1; jack, queen and king "
            f"{FACES[str(self.face)]}. Use the number of every card exactly once, with +, -, *, / and parentheses, to "
            f'make {target}. End with "The answer is" and your equation, which must end with "= {target}".'
        )


def _named(hand: Sequence[Card]) -> str:
    return ", ".join(f"the {_RANKS.get(rank, rank)} of {suit}" for rank, suit in hand)


def _check_choice(option: str, value: int | str, choices: Collection[int | str]) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise UserError(f"{option} = {value!r} is no option of {GeneralPoints.name}; give one of {known}")


def load(case: Mapping[str, Any]) -> None:
    """Nothing: a case has all that is needed."""


def verdicts(case: Mapping[str, Any]) -> Iterator[Verdict]:
    """The verdicts on the completion of a case, stage by stage."""
    yield failed("timed out")
    yield _verdict(case["numbers"], case["target"], case["completion"])


def _verdict(numbers: Sequence[int], target: int, completion: str) -> Verdict:
    equation = read_equation(completion)
    if equation is None:
        return failed("unparseable")
    try:
        first, *others = (read(side) for side in equation.split("="))
    except SyntaxError:
        return failed("unparseable", equation)
    except (NotArithmetic, ZeroDivisionError):
        return failed("wrong", equation)
    is_reached = all(side.value == target for side in (first, *others))
    return judged(is_reached and sorted(first.numbers) == sorted(numbers), equation)


_EQUATION = re.compile(
    r"(?:[a-z',: ]*[ :])?(?P<equation>[-+*/^()=.\d\s]*\d[-+*/^()=.\d\s]*)(?:[ :][a-z',: ]*)?", re.IGNORECASE
)
_SIGNS = (
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\times|\\cdot|[×·∗]"), "*"),
    (re.compile(r"(?<=[\d)])\s*x\s*(?=[\d(])", re.IGNORECASE), "*"),
    (re.compile(r"\\div|÷"), "/"),
    (re.compile(r"[−–﹣－]"), "-"),
    (re.compile(r"\\left|\\right"), ""),
    (re.compile(r"\\[()\[\],;!]|\$"), " "),
    (re.compile(r"\["), "("),
    (re.compile(r"\]"), ")"),
)


def read_equation(completion: str) -> str | None:
    """The equation that a completion ends with, in plain signs, or None."""
    place = answer_place(completion)
    if place is not None:
        return next(_equations(next((line for line in place.split("\n") if line.strip(" :*$")), "")), None)
    for line in reversed(completion.split("\n")):
        *_, last = None, *_equations(line)
        if last is not None:
            return last
    return None


def _equations(line: str) -> Iterator[str]:
    for sign, plain in _SIGNS:
        line = sign.sub(plain, line)
    for clause in CLAUSE_END.split(line):
        text = clause.strip(" :*`\"'")
        match = _EQUATION.fullmatch(text) if len(text) <= LONGEST_CLAUSE else None
        if match:
            yield match["equation"].strip()
