r"""Mathematical problems with gold answers, from JSON Lines files or the Hub, graded by math-verify.

Read as they are: MATH and MATH-500 (`problem`, `answer` or a `\boxed{}` in `solution`), GSM8K
(`question`, an `answer` that ends with "#### 72"), AIME and AMC (whole numbers), and DAPO-Math-17k
(`prompt` as a message, the gold answer in `reward_model.ground_truth`). An `input` or a `context` beside
a question belongs to it. Other columns are named by their paths, and stand alone.

What counts as equal is decided in `equality`, by math-verify over sympy: 1/2 is 0.5, x = 3 is 3, a percentage is
its number with or without the sign. tests/tasks/test_mathematics.py holds two hundred cases of it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from moe_bias.extras import need
from moe_bias.mistakes import UserError, shown
from moe_bias.tasks.answers import last_boxed
from moe_bias.tasks.columns import message_of, with_context
from moe_bias.tasks.grader import Grader, shared_grader
from moe_bias.tasks.rows import is_missing, read_rows, text_of
from moe_bias.tasks.task import Problem, too_few
from moe_bias.tasks.verdict import Verdict

QUESTION_COLUMNS = ("problem", "question", "prompt")
GOLD_COLUMNS = ("answer", "ground_truth", "reward_model.ground_truth", "final_answer", "solution")
WORKED_COLUMNS = ("solution", "answer")
INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""GSM8K's marks of a calculator's use."""
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_BRACKETS = re.compile(r"[(\[{]")
"""In a point, an interval or a set a comma stands between numbers."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold the question, the gold answer and a worked one; "" looks for the usual names."""

    question: str = ""
    gold: str = ""
    worked: str = ""


@dataclass(frozen=True)
class MathematicsTask:
    """A data set's problems, without repeated questions, in its order."""

    name: str
    all_problems: Sequence[Problem] = field(repr=False)
    grader: Grader = field(repr=False, compare=False, default_factory=shared_grader)

    def problems(self, count: int, seed: int) -> list[Problem]:
        """`count` problems drawn by the seed. Raises UserError where there are fewer."""
        if count > len(self.all_problems):
            raise too_few(self.name, len(self.all_problems), count)
        return random.Random(seed).sample(self.all_problems, count)

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Verdicts by math-verify, at most the grader's limit for each."""
        pairs = zip(problems, completions, strict=True)
        return self.grader.grade("mathematics", [{"gold": p.gold, "completion": text} for p, text in pairs])


def data_task(
    source: str,
    split: str = "test",
    columns: Columns | None = None,
    instruction: str = INSTRUCTION,
    grader: Grader | None = None,
    configuration: str | None = None,
) -> MathematicsTask:
    """The problems of a JSON Lines file, or of a Hub data set's split and configuration.

    `instruction` follows every question, except one that comes as a message and so says what it wants.
    Raises UserError on a source that cannot be read and on a row without question or gold answer.
    """
    need("math_verify", "grading mathematics")
    rows = enumerate(read_rows(source, split, configuration), 1)
    chosen = columns or Columns()
    problems = [read_problem(row, f"row {number} of {source}", chosen, instruction) for number, row in rows]
    different = {problem.question: problem for problem in reversed(problems)}
    return MathematicsTask(source, tuple(reversed(different.values())), grader or shared_grader())


def read_problem(row: Any, where: str, columns: Columns, instruction: str) -> Problem:
    """One row as a problem; `where` names it in errors."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is not an object with columns but {shown(row)}")
    asked = _wanted(row, columns.question, QUESTION_COLUMNS, where)
    if isinstance(asked, str) and not columns.question:
        asked = with_context(asked, row, where)
    question = _question(asked, where, instruction)
    gold = _text(_wanted(row, columns.gold, GOLD_COLUMNS, where), where)
    worked = _column(row, (columns.worked,) if columns.worked else WORKED_COLUMNS)
    return Problem(question, gold_answer(gold), _worked(worked), row)


def gold_answer(text: str) -> str:
    r"""The answer within what a data set gives as one: after GSM8K's "####", in the last `\boxed{}`, or all of it."""
    _, mark, after = text.rpartition("####")
    if mark:
        after = after.strip()
        return after if _BRACKETS.search(after) else _THOUSANDS.sub(lambda number: number[0].replace(",", ""), after)
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip().rstrip(".,")  # a sentence's end, which LaTeX cannot read


def _wanted(row: Mapping[str, Any], chosen: str, usual: Sequence[str], where: str) -> Any:
    names = (chosen,) if chosen else usual
    value = _column(row, names)
    if value is None:
        empty = [name for name in names if name in row]
        found = f"nothing in its column {empty[0]!r}" if empty else f"columns {sorted(row)}"
        raise UserError(f"{where} has {found}; needed is {' or '.join(names)}")
    return value


def _column(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value at the first path that the row has, or None; `a.b` is column b within column a."""
    for name in names:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value == "" or not is_missing(value):
            return value
    return None


def _question(value: Any, where: str, instruction: str) -> str:
    if isinstance(value, str):
        question = text_of(value, f"{where}: the question")
        return f"{question}\n\n{instruction}" if instruction else question
    if isinstance(value, Sequence) and len(value) == 1:
        message = message_of(value[0], f"{where}: the question")
        if message["role"] == "user":
            return str(message["content"])
    raise UserError(f"{where} has a question that is neither text nor one message of the user: {shown(value)}")


def _text(value: Any, where: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        return f"\\text{{{value}}}"  # math-verify reads words in LaTeX alone
    if isinstance(value, float) and math.isfinite(value):
        return _decimal(value)
    if isinstance(value, str | int):
        return str(value)
    raise UserError(f"{where} has a gold answer that is neither text nor a number: {value!r}")


def _decimal(value: float) -> str:
    """A number as people write it, to the 15 digits that a float holds: 0.00001, 0.3 for 0.1 + 0.2, 3 for 3.0."""
    return format(Decimal(f"{value:.15g}").normalize(), "f")


def _worked(value: Any) -> str:
    """A solution, in the form that `INSTRUCTION` asks for where it is GSM8K's; "" for a bare answer."""
    if not isinstance(value, str):
        return ""
    steps, mark, _ = value.rpartition("####")
    if mark:
        return f"{_CALCULATOR.sub('', steps).strip()}\nThe answer is \\boxed{{{gold_answer(value)}}}."
    return value if last_boxed(value) is not None else ""
