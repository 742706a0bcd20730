"""What a completion gives as its answer to a problem of reasoning-gym, judged by the task's scorer.

An answer is read in one place, and there in more than one way: with and without the marks around it, since a full
stop or a quotation mark ends the sentence in one completion and belongs to the answer in another. It is correct
where one of the readings gets full marks. The task and its gold answer only say what is looked for: a number, a
line, or a block of lines.

This runs in a process of its own (`grading_worker`), under a time limit.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from io import StringIO
from typing import Any

from moe_bias.tasks.answers import CLAUSE_END, answer_place, with_plain_minus
from moe_bias.tasks.options import fitted
from moe_bias.tasks.verdict import Verdict, failed, judged

BLOCKS = frozenset(
    {
        "arc_agi",
        "futoshiki",
        "kakurasu",
        "manipulate_matrix",
        "mini_sudoku",
        "modulo_grid",
        "pool_matrix",
        "rearc",
        "rotate_matrix",
        "sudoku",
        "survo",
        "tower_of_hanoi",
    }
)
"""Tasks whose answers have several lines."""
TEXTS = frozenset(
    {
        "base_conversion",
        "complex_arithmetic",
        "fraction_simplification",
        "polynomial_equations",
        "prime_factorization",
    }
)
"""Tasks whose answers may look like a number without being one: of "3 * 43", 43 is no answer."""
NOT_OPTIONS = ("size", "seed")
"""Of a data set's config: how many problems are drawn, and by what seed, is said elsewhere."""
MOST_READINGS = 8
_NUMBER = re.compile(r"(?<!\w)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_NOT_NUMBERS = re.compile(r"(?<![^\W\d_])(?:nan|inf(?:inity)?)[ij]?(?![^\W\d_])", re.IGNORECASE)
_PAIRS = ("**", "*", "`", '"', "'", "$")
_STYLED = re.compile(r"\\(?:text|math)[a-z]*\{(.*)\}", re.DOTALL)
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_AROUND = " :.*\"'`\n\t"


def packed(value: Any) -> Any:
    """An entry in JSON's types, from which `_unpacked` makes tuples again, which some scorers compare with."""
    if isinstance(value, tuple):
        return {"tuple": [packed(part) for part in value]}
    if isinstance(value, Mapping):
        return {str(name): packed(part) for name, part in value.items()}
    if isinstance(value, list):
        return [packed(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(part) for part in value]
    if isinstance(value, dict):
        if value.keys() == {"tuple"}:
            return tuple(_unpacked(part) for part in value["tuple"])
        return {name: _unpacked(part) for name, part in value.items()}
    return value


def make_dataset(name: str, options: Mapping[str, Any], size: int, seed: int) -> Any:
    """The data set of reasoning-gym, which raises what it will on values that it cannot use.

    Raises UserError on options that the task lacks or that are of another type.
    """
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        given = fitted(name, DATASETS[name][1], options, apart=NOT_OPTIONS)
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **given)


def load(case: Mapping[str, Any]) -> None:
    """Makes the task's data set, which holds its scorer."""
    _scorer(case["task"], json.dumps(case["options"]))


@lru_cache(maxsize=16)
def _scorer(name: str, options: str) -> Callable[..., float]:
    score: Callable[..., float] = make_dataset(name, _unpacked(json.loads(options)), 1, 0).score_answer
    return score


def verdicts(case: Mapping[str, Any]) -> Iterator[Verdict]:
    """The verdicts on the completion of a case, stage by stage."""
    yield failed("timed out")
    entry = _unpacked(case["entry"])
    found = readings(case["completion"], str(entry["answer"]), case["task"])
    if not found:
        yield failed("unparseable")
        return
    yield failed("timed out", found[-1])
    yield _judged(found, _marks(case, entry), str(entry["answer"]))


def _marks(case: Mapping[str, Any], entry: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether an answer is right, by our own comparison where reasoning-gym's holds wrong answers for right."""
    if case["task"] in COMPARED_HERE:
        return lambda answer: COMPARED_HERE[case["task"]](answer, entry["answer"])
    score = _scorer(case["task"], json.dumps(case["options"]))
    return lambda answer: score(answer=answer, entry=dict(entry)) >= 1.0


def _judged(found: Sequence[str], is_right: Callable[[str], bool], gold: str) -> Verdict:
    """The verdict names the plainest reading, so that the same answers are the same in a vote."""
    are_all_odd = True
    for answer in found:
        try:
            if is_right(answer) and not _is_not_a_number(answer, gold):
                return judged(True, found[-1])
            are_all_odd = False
        except Exception:  # scorers raise all sorts of things on answers of a form that they do not expect
            continue
    return failed("unparseable", found[-1]) if are_all_odd else judged(False, found[-1])


def _is_not_a_number(answer: str, gold: str) -> bool:
    """Comparisons with NaN go either way, so that some scorers hold it for equal to every number."""
    return bool(_NOT_NUMBERS.search(answer)) and not _NOT_NUMBERS.search(gold)


def _same_number(answer: str, gold: str) -> bool:
    return float(answer) == float(gold)


def _same_numbers(answer: str, gold: str) -> bool:
    listed, wanted = (json.loads(text.replace("'", '"')) for text in (answer, gold))
    return list(map(float, listed)) == list(map(float, wanted))


def _same_words(answer: str, gold: str) -> bool:
    return answer.lower().split() == gold.lower().split()


def _same_letters(answer: str, gold: str) -> bool:
    return "".join(answer.lower().split()) == "".join(gold.lower().split())


def _same_list(answer: str, gold: str) -> bool:
    return [part.strip() for part in answer.split(",")] == [part.strip() for part in gold.split(",")]


def _same_number_or_words(answer: str, gold: str) -> bool:
    return _same_number(answer, gold) if is_number(gold) else _same_words(answer, gold)


COMPARED_HERE: dict[str, Callable[[str, str], bool]] = {
    "calendar_arithmetic": _same_number_or_words,
    "figlet_font": _same_letters,
    "gsm_symbolic": _same_number,
    "letter_jumble": _same_words,
    "number_sorting": _same_numbers,
    "spell_backward": _same_words,
    "word_sorting": _same_list,
}
"""Tasks whose scorers give full marks to wrong answers: to more after the right letters or words (of 9 or 11 letters in
`spell_backward`, past the tenth in `figlet_font`), to either sign in `gsm_symbolic`, to any number where the answer of
`calendar_arithmetic` is -1, and to numbers that are off by 1 in `number_sorting`."""


def readings(completion: str, gold: str, task: str = "") -> list[str]:
    """The ways to read a completion's answer, the plainest last; none where there is nothing to read.

    Read is the place that `answer_place` finds; without one, the end of the completion. Of the numbers of a clause
    the last counts, as in "the answer is 3 * 6 = 18".
    """
    if with_plain_minus(gold) == gold:
        completion = with_plain_minus(completion)
    place = answer_place(completion)
    if task in BLOCKS:
        return _distinct(way for block in _blocks(completion, place) for way in _peeled(block))
    lines = [line for line in (completion if place is None else place).splitlines() if _is_text(line)]
    if task in TEXTS or not is_number(gold):
        return _distinct(_peeled(lines[-1 if place is None else 0])) if lines else []
    text = CLAUSE_END.split(lines[0].strip(_AROUND))[0] if place is not None and lines else completion
    numbers = _NUMBER.findall(_FRACTION.sub(r"\1/\2", text.replace("{,}", ",")))
    return [numbers[-1].replace(",", "")] if numbers else []


def is_number(gold: str) -> bool:
    """Whether a gold answer is a number, so that one is looked for."""
    return bool(_NUMBER.fullmatch(gold))


def _is_text(line: str) -> bool:
    return bool(line.strip(_AROUND)) and not line.startswith("```")


def _blocks(completion: str, place: str | None) -> Iterator[str]:
    """All of the place or the completion, its fenced block, and the paragraph nearest to where the answer stands."""
    text = completion if place is None else place
    which = -1 if place is None else 0
    yield text
    if fenced := _FENCED.findall(text):
        yield fenced[which]
    elif paragraphs := [part for part in text.split("\n\n") if _is_text(part)]:
        yield paragraphs[which]


def _peeled(text: str) -> Iterator[str]:
    """The text as it stands, and then again and again without what stands around it."""
    text = "\n".join(line.rstrip() for line in text.split("\n")).strip()
    for _ in range(MOST_READINGS - 1):
        yield text
        text = _without_the_outermost(text)
    yield text.strip(_AROUND)


def _without_the_outermost(text: str) -> str:
    for mark in _PAIRS:
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            return text[len(mark) : -len(mark)].strip()
    if styled := _STYLED.fullmatch(text):
        return styled[1].strip()
    return text[:-1].rstrip() if text.endswith(".") else text.strip(_AROUND)


def _distinct(found: Iterator[str]) -> list[str]:
    """Without repetitions; nothing where the plainest reading is empty."""
    ways = list(dict.fromkeys(found))
    return [way for way in ways if way] if ways and ways[-1] else []
