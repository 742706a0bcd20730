import pytest

from moe_bias.config import UserError
from moe_bias.tasks.procedural import RUN_ANSWERS, SMALL_OPTIONS, WORKED, ProceduralTask, extract_answer


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
        ("The answer is ['4', '-7'].", "['4', '-7']", "['4', '-7']"),
        ("2/3 of it", "2/3", "2/3"),
        ("I cannot say.", "5", None),
        ("Let me think.\n\nThe answer is Yes.", "Yes", "Yes"),
        ("It follows from 2.\nNo", "No", "No"),
        ("", "No", None),
    ],
)
def test_extract_answer(completion, gold, answer):
    assert extract_answer(completion, gold) == answer


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


@pytest.mark.parametrize("name", sorted(RUN_ANSWERS))
def test_tasks_whose_scorers_run_the_answer_as_code_are_refused(name):
    with pytest.raises(UserError, match=f"task '{name}' is refused: its scorer runs the model's answers as code"):
        ProceduralTask(name).problems(1, seed=0)


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
    with pytest.raises(UserError, match=r"reasoning-gym has no task 'product'; near names are products, "):
        ProceduralTask("product").problems(3, seed=0)


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="reasoning-gym cannot make task 'products' with"):
        ProceduralTask("products", {"no_such_option": 1}).problems(3, seed=0)
