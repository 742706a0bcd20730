"""Arithmetic over whole numbers with + - * /: reading it from untrusted text, and searching all of it.

Reading goes through Python's own parser and then takes a handful of its nodes; nothing is evaluated
that is not a whole number or one of the four operations, in exact fractions.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Operation = Callable[[Fraction, Fraction], Fraction]
_OPERATIONS: dict[type[ast.operator], tuple[str, Operation]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


class NotArithmetic(ValueError):  # noqa: N818
    """The text is an expression, but not of whole numbers and + - * / alone."""


@dataclass(frozen=True)
class Arithmetic:
    """What an expression is worth, the numbers that it uses, and its steps, inner ones first."""

    value: Fraction
    numbers: tuple[int, ...]
    steps: tuple[str, ...] = ()


def read(text: str) -> Arithmetic:
    """The expression that a short text is; on thousands of characters Python's parser gives out in its own ways.

    Raises SyntaxError on text that is no expression, NotArithmetic on other numbers or operations
    (a sign, a power), and ZeroDivisionError.
    """
    return _read(ast.parse(text.strip(), mode="eval").body)


def _read(node: ast.expr) -> Arithmetic:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Arithmetic(Fraction(node.value), (node.value,))
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATIONS:
        raise NotArithmetic(ast.unparse(node))
    sign, operate = _OPERATIONS[type(node.op)]
    left, right = _read(node.left), _read(node.right)
    value = operate(left.value, right.value)
    step = f"{_plain(left.value)} {sign} {_plain(right.value)} = {value}."
    return Arithmetic(value, left.numbers + right.numbers, (*left.steps, *right.steps, step))


def _plain(value: Fraction) -> str:
    """A value as an operand: in parentheses where it has a sign or a denominator."""
    return str(value) if value >= 0 and value.denominator == 1 else f"({value})"


@dataclass(frozen=True)
class Expression:
    """A way to a value: its text, how tightly that binds, and how many steps leave the natural numbers."""

    text: str
    binds: int
    detours: int


_SUM, _PRODUCT, _NUMBER = 0, 1, 2


@lru_cache(maxsize=4096)
def reachable(numbers: tuple[int, ...]) -> dict[Fraction, Expression]:
    """Every value of an expression that uses each of the sorted numbers once, with its plainest expression."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): Expression(str(numbers[0]), _NUMBER, 0)}
    found: dict[Fraction, Expression] = {}
    for left, right in _splits(numbers):
        for a, way_to_a in reachable(left).items():
            for b, way_to_b in reachable(right).items():
                for value, expression in _combined(a, way_to_a, b, way_to_b):
                    if value not in found or expression.detours < found[value].detours:
                        found[value] = expression
    return found


def _splits(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every way to part the numbers in two, each pair of parts once."""
    seen = set()
    for mask in range(2 ** (len(numbers) - 1) - 1):
        chosen = [True, *(bool(mask >> place & 1) for place in range(len(numbers) - 1))]
        left = tuple(n for n, is_left in zip(numbers, chosen, strict=True) if is_left)
        right = tuple(n for n, is_left in zip(numbers, chosen, strict=True) if not is_left)
        if (left, right) not in seen and (right, left) not in seen:
            seen.add((left, right))
            yield left, right


def _combined(a: Fraction, x: Expression, b: Fraction, y: Expression) -> Iterator[tuple[Fraction, Expression]]:
    yield _joined(a + b, x, " + ", y, _SUM)
    yield _joined(a - b, x, " - ", y, _SUM)
    yield _joined(b - a, y, " - ", x, _SUM)
    yield _joined(a * b, x, " * ", y, _PRODUCT)
    if b:
        yield _joined(a / b, x, " / ", y, _PRODUCT)
    if a:
        yield _joined(b / a, y, " / ", x, _PRODUCT)


def _joined(value: Fraction, left: Expression, sign: str, right: Expression, binds: int) -> tuple[Fraction, Expression]:
    """After - and /, parentheses also stand around what binds as tightly."""
    first = f"({left.text})" if left.binds < binds else left.text
    tighter = sign in (" - ", " / ")
    second = f"({right.text})" if right.binds < binds + tighter else right.text
    is_detour = value < 0 or value.denominator != 1
    return value, Expression(first + sign + second, binds, left.detours + right.detours + is_detour)
