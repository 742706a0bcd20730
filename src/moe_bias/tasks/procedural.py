"""Problems made on the spot by reasoning-gym, with worked answers and its own scorers.

An answer is correct where the scorer gives full marks, else wrong: its partial marks, often given
for the form alone, are no reward. Tasks whose scorers cannot be relied on are refused (`REFUSED`).

A worked answer leads to the result in steps and ends with "The answer is X."; `reading.readings`
reads that form, and is generous to models that answer in their own words.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from moe_bias.extras import need
from moe_bias.mistakes import UserError
from moe_bias.plugins import unknown
from moe_bias.tasks.grader import shared_grader
from moe_bias.tasks.reading import make_dataset, packed
from moe_bias.tasks.task import TASKS, Entry, Problem, too_few
from moe_bias.tasks.verdict import Verdict

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

_RUNS_ANSWERS = "its scorer runs the model's answers as code"
_HAS_NO_ANSWER = "its problems come without a right answer to show or to compare with"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "binary_matrix",
            "countdown",
            "intermediate_integration",
            "n_queens",
            "polynomial_multiplication",
            "puzzle24",
            "simple_integration",
            "spiral_matrix",
            "string_insertion",
        ),
        _RUNS_ANSWERS,
    ),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _HAS_NO_ANSWER),
    "codeio": "its problems are made by running programs of others, which write files into the current folder",
    "coin_flip": "its scorer holds 0 for right wherever the probability is small, which it mostly is",
    "composite": "it is a mixture of other tasks",
    "game_of_life_halting": "its scorer holds every answer for right that is not empty",
}
"""Tasks that cannot serve as a reward, and why not."""


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

        Raises UserError on a task that is unknown or refused, on options that it lacks or cannot use, and where these
        allow too few different problems.
        """
        seen: dict[str, Problem] = {}
        for size in (count * 2, count * 8):
            for entry in _entries(self._dataset(size, seed)):
                if entry["answer"] is None:
                    raise _refused(self.name, _HAS_NO_ANSWER)
                if str(entry["answer"]).strip():  # an empty answer cannot be told from none
                    seen.setdefault(entry["question"], self._problem(entry))
                if len(seen) == count:
                    return list(seen.values())
        raise too_few(self.name, len(seen), count)

    def verify(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Verdicts by reasoning-gym's scorer on the answers that `reading.readings` finds."""
        shared = {"task": self.name, "options": packed(self.options)}
        pairs = zip(problems, completions, strict=True)
        cases = [{**shared, "entry": packed(problem.entry), "completion": text} for problem, text in pairs]
        return shared_grader().grade("procedural", cases)

    def _problem(self, entry: Entry) -> Problem:
        worked = WORKED.get(self.name, _bare)(entry)
        return Problem(entry["question"], str(entry["answer"]), worked, entry)

    def _dataset(self, size: int, seed: int) -> Any:
        if self.name in REFUSED:
            raise _refused(self.name, REFUSED[self.name])
        known = data_sets(f"task {self.name!r}")
        if self.name not in known:
            raise unknown(TASKS, self.name, {*known, "general_points"} - REFUSED.keys())
        try:
            return make_dataset(self.name, self.options, size, seed)
        except UserError:
            raise
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(
                f"reasoning-gym cannot make task {self.name!r} with {dict(self.options)}: {error}"
            ) from error


def data_sets(use: str) -> Mapping[str, tuple[type[Any], type[Any]]]:
    """The class and the config of every data set of reasoning-gym, whatever can be used of them.

    Raises UserError, naming the use, where reasoning-gym is not installed.
    """
    need("reasoning_gym", use)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        from reasoning_gym.factory import DATASETS

        found: Mapping[str, tuple[type[Any], type[Any]]] = DATASETS
        return found


def _refused(name: str, reason: str) -> UserError:
    return UserError(f"task {name!r} is refused: {reason}; take another")


def _entries(dataset: Any) -> Iterator[Entry]:
    """The data set's entries one by one, without what some generators print."""
    for number in range(len(dataset)):
        with redirect_stdout(StringIO()):
            entry: Entry = dataset[number]
        yield entry


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
