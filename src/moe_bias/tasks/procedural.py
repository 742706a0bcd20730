"""Problems made on the spot by reasoning-gym, with worked answers and its own scorers.

An answer is correct where the scorer gives full marks, else wrong: its partial marks, often given
for the form alone, are no reward.

A worked answer leads to the result in steps and ends with "The answer is X."; `extract_answer`
reads that form, and is generous to models that answer in their own words.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from moe_bias.config import UserError
from moe_bias.tasks.answers import CLAUSE_END, stated_answer
from moe_bias.tasks.task import Entry, Problem, too_few
from moe_bias.tasks.verdict import Verdict, failed, judged

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_AROUND_ANSWERS = " :.*\"'`"
_UNREADABLE = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError)
"""What scorers raise on answers that are not of the form they expect, such as words for a list of factors."""


SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "products": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 5},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "gcd": {"max_value": 50},
    "count_bits": {"max_n": 255},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 12},
    "number_filtering": {"max_numbers": 5, "max_decimals": 0},
}
"""Options that bring a task into the reach of a model of 135M parameters, where it has any."""

RUN_ANSWERS = {
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
"""Tasks whose scorers evaluate the answer as Python: a completion could run any code, or never end."""


@dataclass(frozen=True)
class ProceduralTask:
    """A reasoning-gym data set with its options; `sized_for_small_models` gives easy ones."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def sized_for_small_models(cls, name: str, options: Mapping[str, Any]) -> ProceduralTask:
        """The task with `SMALL_OPTIONS`, and the given options over them."""
        return cls(name, {**SMALL_OPTIONS.get(name, {}), **options})

    def problems(self, count: int, seed: int) -> list[Problem]:
        """`count` problems, no question twice.

        Raises UserError on an unknown task and where the options allow too few different problems.
        """
        seen: dict[str, Problem] = {}
        for size in (count * 2, count * 8):
            for entry in self._dataset(size, seed):
                seen.setdefault(entry["question"], self._problem(entry))
                if len(seen) == count:
                    return list(seen.values())
        raise too_few(self.name, len(seen), count)

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Verdicts by reasoning-gym's scorer on the answers that `extract_answer` finds."""
        score = self._dataset(1, 0).score_answer
        return [_verdict(problem, text, score) for problem, text in zip(problems, completions, strict=True)]

    def _problem(self, entry: Entry) -> Problem:
        worked = WORKED.get(self.name, _bare)(entry)
        return Problem(entry["question"], str(entry["answer"]), worked, entry)

    def _dataset(self, size: int, seed: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        if self.name not in DATASETS:
            near = get_close_matches(self.name, DATASETS, n=3, cutoff=0.0)
            raise UserError(f"reasoning-gym has no task {self.name!r}; near names are {', '.join(near)}")
        if self.name in RUN_ANSWERS:
            raise UserError(f"task {self.name!r} is refused: its scorer runs the model's answers as code; take another")
        try:
            return reasoning_gym.create_dataset(self.name, size=size, seed=seed, **self.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(
                f"reasoning-gym cannot make task {self.name!r} with {dict(self.options)}: {error}"
            ) from error


def _verdict(problem: Problem, completion: str, score: Callable[..., float]) -> Verdict:
    answer = extract_answer(completion, problem.gold)
    if answer is None:
        return failed("unparseable")
    try:
        return judged(score(answer=answer, entry=dict(problem.entry)) >= 1.0, answer)
    except _UNREADABLE:
        return failed("unparseable", answer)


def extract_answer(completion: str, gold: str) -> str | None:
    """What a completion gives as its answer, or None where there is nothing to read.

    Read is the line after its last "answer is"; without one, all of it. Of the numbers of a clause
    the last counts, as in "the answer is 3 * 6 = 18"; the gold answer only says whether it is a number.
    """
    stated = stated_answer(completion)
    last = completion if stated is None else stated
    lines = [line.strip(_AROUND_ANSWERS) for line in last.splitlines() if line.strip(_AROUND_ANSWERS)]
    if not _NUMBER.fullmatch(gold):
        return lines[-1 if stated is None else 0] if lines else None
    text = CLAUSE_END.split(lines[0])[0] if stated is not None and lines else last
    numbers = _NUMBER.findall(text)
    return str(numbers[-1]).replace(",", "") if numbers else None


def _bare(entry: Entry) -> str:
    return f"The answer is {entry['answer']}."


def _worked_products(entry: Entry) -> str:
    factors = [int(factor) for factor in entry["metadata"]["expression"].split(" * ")]
    steps, value = [], factors[0]
    for factor in factors[1:]:
        steps.append(f"{value} * {factor} = {value * factor}.")
        value *= factor
    return " ".join([*steps, _bare(entry)])


def _worked_chain_sum(entry: Entry) -> str:
    parts = entry["metadata"]["expression"].split(" ")
    steps, value = [], int(parts[0])
    for sign, term in zip(parts[1::2], parts[2::2], strict=True):
        result = value + int(term) if sign == "+" else value - int(term)
        steps.append(f"{value} {sign} {term} = {result}.")
        value = result
    return " ".join([*steps, _bare(entry)])


def _worked_legs(entry: Entry) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps, total = [], 0
    for animal, count in entry["metadata"]["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{animal}: {count} * {ANIMALS[animal]} = {legs}, together {total} + {legs} = {total + legs}.")
        total += legs
    return " ".join([*steps, _bare(entry)])


def _worked_letters(entry: Entry) -> str:
    letter, steps, total = entry["metadata"]["target_letter"], [], 0
    for word in entry["metadata"]["span"]:
        total += word.lower().count(letter)
        steps.append(f"{word}: {word.lower().count(letter)}, together {total}.")
    return " ".join([*steps, _bare(entry)])


def _worked_backward(entry: Entry) -> str:
    word = entry["metadata"]["word"]
    return f"{word}: {' '.join(word)}. Backward: {' '.join(reversed(word))}. {_bare(entry)}"


def _worked_gsm(entry: Entry) -> str:
    return f"{entry['metadata']['answer_cot'].strip()}\n{_bare(entry)}"


WORKED: dict[str, Callable[[Entry], str]] = {
    "products": _worked_products,
    "chain_sum": _worked_chain_sum,
    "leg_counting": _worked_legs,
    "letter_counting": _worked_letters,
    "spell_backward": _worked_backward,
    "gsm_symbolic": _worked_gsm,
}
"""Worked answers by task; other tasks are answered in one line."""
