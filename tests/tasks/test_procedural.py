import json
import random
import time
import warnings
from fractions import Fraction

import pytest

from moe_bias.mistakes import UserError
from moe_bias.tasks import procedural
from moe_bias.tasks.grader import Grader
from moe_bias.tasks.procedural import REFUSED, SMALL_OPTIONS, WORKED, ProceduralTask
from moe_bias.tasks.reading import BLOCKS, TEXTS, is_number, make_dataset, packed, readings
from moe_bias.tasks.task import Problem

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)
    from reasoning_gym.factory import DATASETS

TASKS = sorted(DATASETS.keys() - REFUSED.keys())
SLOW_TO_MAKE = {"knight_swap": 2, "futoshiki": 12, "sokoban": 12, "zebra_puzzles": 12}
"""So many problems at most of tasks that take longer than 0.1 s for one."""
FORMS = (
    "{}",
    "The answer is {}.",
    r"So the answer is \boxed{{{}}}.",
    "<think>1 + 1 = 2? No.</think>\n<answer>{}</answer>",
    "First I tried 3 ways.\n\nAnswer: {}",
)
NOTHING = (
    "",
    " ",
    "I do not know.",
    "The answer is .",
    "The answer is None.",
    "The answer is nothing at all.",
    r"\boxed{nan}",
    "The answer is nan + nani.",
    "[NaN, NaN, NaN]",
    "The answer is 1e9999999999.",
    "The answer is inf.",
    "0",
    "[]",
)
"""Answers that say nothing; where one of them is the gold answer, it is right."""


@pytest.fixture(scope="module")
def impatient():
    """A grader that gives each answer a second."""
    grader = Grader(limit=1.0, workers=1)
    yield grader
    grader.close()


@pytest.fixture(autouse=True)
def _impatience(impatient, monkeypatch):
    monkeypatch.setattr(procedural, "shared_grader", lambda: impatient)


@pytest.mark.parametrize(
    ("completion", "gold", "answer"),
    [
        ("3 * 4 = 12. The answer is 12.", "12", "12"),
        ("The answer is 7. No, wait: the answer is 12.", "12", "12"),
        ("So we have 1,200 in all", "1200", "1200"),
        ("Answer: **-3**, because 4 - 7 = -3 and 1 + 1 = 2", "-3", "-3"),
        ("First 6 * 7 = 42, then 42 / 2 = 21", "21", "21"),
        ("The answer is 3 * 6 = 18. The sum of 1 and 2 is 3.", "18", "18"),
        ("The answer is:\n\n**40**", "40", "40"),
        ("The answer is 1,200, as said in 3.", "1200", "1200"),
        ("They are 1,2", "12", "2"),
        ("It is .5", "0.5", ".5"),
        ("The answer is 1.5e-22.", "1.5e-22", "1.5e-22"),
        ("The answer is f243.", "243", None),
        ("The answer is ['4', '-7'].", "['4', '-7']", "['4', '-7']"),
        ("2/3 of it", "2/3", "2/3"),
        (r"It is \boxed{\frac{2}{3}}.", "2/3", "2/3"),
        (r"It is \boxed{1{,}200}, not 7.", "1200", "1200"),
        ("The answer is \u22123.", "-3", "-3"),
        ("4 \u2212 7 = \uff0d3", "-3", "-3"),
        ("It is \u20133", "-3", "-3"),
        ("From 1\u20133", "3", "3"),
        ("The answer is ['4', '\u22127'].", "['4', '-7']", "['4', '-7']"),
        ("The answer is 3 \u2212 2i.", "3 - 2i", "3 - 2i"),
        ("The answer is a\u2212b.", "a\u2212b", "a\u2212b"),
        ("I cannot say.", "5", None),
        ("Let me think.\n\nThe answer is Yes.", "Yes", "Yes"),
        ("It follows from 2.\nNo", "No", "No"),
        (r"The answer is $\boxed{\text{Yes}}$, not No.", "Yes", "Yes"),
        ("Yes?\n<answer>\nNo\n</answer> Yes!", "No", "No"),
        ("<answer>The answer is No.</answer>", "No", "No"),
        (r"<answer>\boxed{No}</answer>", "No", "No"),
        ("**Answer:** No", "No", "No"),
        ("", "No", None),
        ("The answer is .", "No", None),
    ],
)
def test_the_plainest_reading(completion, gold, answer):
    found = readings(completion, gold)
    assert (found[-1] if found else None) == answer


def test_any_minus_sign_is_one_for_the_scorers():
    task = ProceduralTask("chain_sum", {"min_digits": 1, "max_digits": 1})
    negative = [problem for problem in task.problems(30, seed=1) if problem.gold.startswith("-")]
    for minus in "-\u2212\uff0d\u2013":
        right = [f"The answer is {problem.gold.replace('-', minus)}." for problem in negative]
        assert all(verdict.is_correct for verdict in task.verify(negative, right))
        wrong = [f"The answer is {problem.gold.removeprefix('-')}." for problem in negative]
        assert not any(verdict.is_correct for verdict in task.verify(negative, wrong))
    assert len(negative) > 3


def test_marks_that_may_belong_to_the_answer_are_read_with_and_without():
    assert readings('The answer is **"Is it?" he said.**.', "text") == [
        '**"Is it?" he said.**.',
        '**"Is it?" he said.**',
        '"Is it?" he said.',
        '"Is it?" he said',
        'Is it?" he said',
    ]


def test_blocks_are_read_whole_in_their_fence_or_in_their_paragraph():
    block = "1 2\n3 4"
    for text in (
        f"The answer is\n\n{block}\n\nAs 1 + 1 = 2.",
        f"First:\n\n{block}",
        f"So the answer is:\n```text\n{block}\n```\nDone.",
        f"I think so.\n```\n0 0\n```\nNo.\n```\n{block}\n```",
        "The answer is 1 2  \n3 4.",
    ):
        assert block in readings(text, "5 6\n7 8", "rotate_matrix"), text


def equals(answer, gold):
    """Whether an answer is the gold one, as text or as a number."""
    if answer == gold:
        return True
    try:
        return "e" not in answer and Fraction(answer) == Fraction(gold)
    except (ValueError, ZeroDivisionError, TypeError):
        return False


def paid_for_nothing(task, problems, completion):
    verdicts = task.verify(problems, [completion] * len(problems))
    assert "timed out" not in [verdict.outcome for verdict in verdicts]
    rows = zip(problems, verdicts, strict=True)
    return [(p.gold, v.answer) for p, v in rows if v.is_correct and not equals(v.answer, p.gold)]


def check_task(name, count):
    task = ProceduralTask(name)
    problems = task.problems(count, seed=5)
    golds = [problem.gold for problem in problems]
    assert all(isinstance(problem.entry["answer"], str) and problem.gold.strip() for problem in problems)
    assert name in BLOCKS or not any("\n" in gold for gold in golds)
    has_both = name in BLOCKS | TEXTS | {"advanced_geometry", "calendar_arithmetic"}
    assert has_both or len({is_number(gold) for gold in golds}) == 1
    for form in FORMS:
        verdicts = task.verify(problems, [form.format(problem.gold) for problem in problems])
        assert [(p.gold, v) for p, v in zip(problems, verdicts, strict=True) if not v.is_correct] == [], form
    worked = task.verify(problems, [problem.worked for problem in problems])
    assert [(p.worked, v) for p, v in zip(problems, worked, strict=True) if not v.is_correct] == []
    letters = random.Random(3).choices("dfghjkmnpqstvwxyz ", k=30)
    for nothing in (*NOTHING, "".join(letters)):
        assert paid_for_nothing(task, problems, nothing) == [], nothing


@pytest.mark.parametrize("name", TASKS)
def test_gold_answers_are_right_in_every_form_and_nothing_is_paid_for_nothing(name):
    check_task(name, min(3, SLOW_TO_MAKE.get(name, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_same_of_many_problems(name):
    check_task(name, SLOW_TO_MAKE.get(name, 60))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_tasks_that_cannot_serve_as_a_reward_are_refused_by_name_with_the_reason(name):
    with pytest.raises(UserError, match=f"task '{name}' is refused: {REFUSED[name]}; take another"):
        ProceduralTask(name).problems(1, seed=0)


@pytest.mark.parametrize("name", ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"])
def test_what_is_refused_for_want_of_an_answer_has_none(name):
    assert [entry["answer"] for entry in make_dataset(name, {}, 2, 0)] == [None, None]


def test_a_task_without_answers_is_refused_even_where_it_is_not_listed(monkeypatch):
    monkeypatch.delitem(REFUSED, "rush_hour")
    with pytest.raises(UserError, match="task 'rush_hour' is refused: its problems come without a right answer"):
        ProceduralTask("rush_hour").problems(2, seed=0)


@pytest.mark.parametrize(("name", "nothing"), [("coin_flip", "0"), ("game_of_life_halting", "I do not know")])
def test_what_is_refused_for_its_scorer_pays_for_nothing(name, nothing):
    dataset = make_dataset(name, {}, 20, 0)
    paid = [dataset.score_answer(nothing, entry) for entry in dataset if entry["answer"] != nothing]
    assert sum(mark >= 1 for mark in paid) > 15


def test_entries_pass_on_their_tuples_and_what_json_does_not_know():
    entry = {"a": (1, [2, (3,)]), "b": Fraction(1, 2), "c": None, "d": {"e": True}}
    assert json.loads(json.dumps(packed(entry))) == {
        "a": {"tuple": [1, [2, {"tuple": [3]}]]},
        "b": "1/2",
        "c": None,
        "d": {"e": True},
    }


@pytest.mark.parametrize(
    ("name", "gold", "wrong", "metadata"),
    [
        ("calendar_arithmetic", "-1", "5", {"task": "recurring_event_day"}),
        ("figlet_font", "BLACKBOARDS", "BLACKBOARDER", {}),
        ("gsm_symbolic", "72", "-72", {}),
        ("letter_jumble", "one two", "one two three", {}),
        ("number_sorting", "['1.0', '2.5']", "['1.0', '2.0']", {"direction": "ascending"}),
        ("number_sorting", "['1.0', '2.5']", "['nan', 'nan']", {"direction": "ascending"}),
        ("complex_arithmetic", "2.0 + 1.0i", "nan + 1.0i", {"result": (2.0, 1.0)}),
        ("spell_backward", "ekilxesnu", "ekilxesnu or so", {}),
        ("word_sorting", "a, b", "a, b, c", {"sorted_words": ["a", "b"]}),
    ],
)
def test_wrong_answers_to_which_reasoning_gym_gives_full_marks(name, gold, wrong, metadata):
    entry = {"answer": gold, "metadata": metadata}
    assert make_dataset(name, {}, 1, 0).score_answer(wrong, entry) >= 1
    problems = [Problem("", gold, "", entry)] * 2
    verdicts = ProceduralTask(name).verify(problems, [f"The answer is {gold}.", f"The answer is {wrong}."])
    assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong"]


@pytest.mark.parametrize("name", sorted(WORKED))
def test_worked_answers_are_right_by_the_tasks_own_scorer(name):
    task = ProceduralTask.sized_for_small_models(name, {})
    problems = task.problems(40, seed=3)
    verdicts = task.verify(problems, [problem.worked for problem in problems])
    assert [verdict for verdict in verdicts if verdict.outcome != "correct" or verdict.reward != 1] == []


def test_worked_product_by_hand():
    # reasoning-gym draws 4 * 0 * 1 among these; worked by hand: 4 * 0 = 0, 0 * 1 = 0.
    task = ProceduralTask.sized_for_small_models("products", {})
    worked = {problem.entry["metadata"]["expression"]: problem.worked for problem in task.problems(900, seed=0)}
    assert worked["4 * 0 * 1"] == "4 * 0 = 0. 0 * 1 = 0. The answer is 0."


def test_wrong_answers_are_wrong_and_answers_without_a_number_unparseable():
    task = ProceduralTask.sized_for_small_models("products", {})
    problems = task.problems(1, seed=0) * 2
    wrong, nothing = task.verify(problems, [f"The answer is {int(problems[0].gold) + 1}.", "I cannot say."])
    assert (wrong.outcome, wrong.answer, wrong.reward) == ("wrong", str(int(problems[0].gold) + 1), 0)
    assert (nothing.outcome, nothing.answer, nothing.reward) == ("unparseable", None, 0)


def test_an_answer_on_which_the_scorer_raises_is_unparseable():
    task = ProceduralTask("prime_factorization")
    (verdict,) = task.verify(task.problems(1, seed=0), ["The answer is a prime."])
    assert (verdict.outcome, verdict.answer) == ("unparseable", "a prime")


def test_no_question_stands_twice_and_the_seed_decides():
    task = ProceduralTask.sized_for_small_models("products", {})
    problems = task.problems(400, seed=1)
    assert len({problem.question for problem in problems}) == 400
    assert [p.question for p in task.problems(400, seed=1)] == [p.question for p in problems]
    assert [p.question for p in task.problems(400, seed=2)] != [p.question for p in problems]


def test_given_options_win_over_those_for_small_models():
    task = ProceduralTask.sized_for_small_models("products", {"max_digits": 2})
    assert task.options == {**SMALL_OPTIONS["products"], "max_digits": 2}


def test_too_few_different_problems_are_refused_with_their_number():
    task = ProceduralTask("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    with pytest.raises(UserError, match=r"task products gives only \d+ different problems, 500 were asked for"):
        task.problems(500, seed=0)


def test_unknown_tasks_are_refused_with_near_names():
    with pytest.raises(UserError, match=r"there is no task 'product', .*; did you mean 'products'"):
        ProceduralTask("product").problems(3, seed=0)


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="task products has no option 'no_such_option'; its options are min_terms, "):
        ProceduralTask("products", {"no_such_option": 1}).problems(3, seed=0)
    with pytest.raises(UserError, match="reasoning-gym cannot make task 'products' with"):
        ProceduralTask("products", {"min_terms": 5, "max_terms": 2}).problems(3, seed=0)


def test_an_answer_on_which_a_scorer_hangs_is_timed_out_and_the_next_one_is_graded(impatient):
    (entry,) = make_dataset("coin_flip", {}, 1, 0)
    case = {"task": "coin_flip", "options": {}, "entry": packed(entry), "completion": "The answer is 1e9999999999."}
    started = time.monotonic()
    (hung,) = impatient.grade("procedural", [case])
    assert (hung.outcome, hung.answer) == ("timed out", "1e9999999999")
    assert time.monotonic() - started > 1  # it had its whole second
    game = {"numbers": [2, 3, 4], "target": 24, "completion": "2 * 3 * 4 = 24"}
    assert impatient.grade("general_points", [game])[0].is_correct
