"""Problems made on the spot by reasoning-gym, with worked answers and its own scorers.

A worked answer leads to the result in steps and ends with "The answer is X."; `extract_answer`
reads that form, and is generous to models that answer in their own words.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from moe_bias.config import UserError

Entry = Mapping[str, Any]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_STATED = re.compile(r"answer(?: is|:)", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[,;.]\s")
_AROUND_ANSWERS = " :.*\"'`"


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer, and a worked answer to learn from."""

    question: str
    gold: str
    worked: str
    entry: Entry = field(repr=False, compare=False)


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
        raise UserError(f"task {self.name} gives only {len(seen)} different problems, {count} were asked for")

    def is_correct(self, problem: Problem, completion: str) -> bool:
        """Whether reasoning-gym's scorer gives full marks to the answer in the completion."""
        answer = extract_answer(completion, problem.gold)
        score = self._dataset(1, 0).score_answer(answer=answer, entry=dict(problem.entry))
        return bool(score >= 1.0)

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
        try:
            return reasoning_gym.create_dataset(self.name, size=size, seed=seed, **self.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(
                f"reasoning-gym cannot make task {self.name!r} with {dict(self.options)}: {error}"
            ) from error


def extract_answer(completion: str, gold: str) -> str | None:
    """What a completion gives as its answer, or None where there is nothing to read.

    Read is the line after its last "answer is"; without one, all of it. Of the numbers of a clause
    the last counts, as in "the answer is 3 * 6 = 18"; the gold answer only says whether it is a number.
    """
    *_, last = _STATED.split(completion)
    stated = last != completion
    lines = [line.strip(_AROUND_ANSWERS) for line in last.splitlines() if line.strip(_AROUND_ANSWERS)]
    if not _NUMBER.fullmatch(gold):
        return lines[0 if stated else -1] if lines else None
    text = _CLAUSE_END.split(lines[0])[0] if stated and lines else last
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
