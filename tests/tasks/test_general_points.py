import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bias.mistakes import UserError
from moe_bias.tasks.arithmetic import NotArithmetic, reachable, read
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.general_points import GeneralPoints, read_equation
from moe_bias.tasks.task import Problem


def hand(*numbers: int, target: int = 24) -> Problem:
    return Problem("", "", "", {"numbers": list(numbers), "target": target})


def outcome(problem: Problem, completion: str) -> str:
    (verdict,) = GeneralPoints().verify([problem], [completion])
    assert verdict.reward == (verdict.outcome == "correct")
    return verdict.outcome


@pytest.mark.parametrize(
    ("numbers", "is_solvable"),
    [
        ((3, 3, 8, 8), True),  # 8 / (3 - 8 / 3), through thirds alone
        ((1, 3, 4, 6), True),  # 6 / (1 - 3 / 4)
        ((1, 5, 5, 5), True),  # 5 * (5 - 1 / 5)
        ((4, 4, 10, 10), True),  # (10 * 10 - 4) / 4
        ((1, 1, 1, 1), False),
        ((1, 1, 1, 8), True),  # 8 * (1 + 1 + 1)
        ((10, 10, 10, 10), False),
        ((1, 1, 1, 7), False),  # the most is (1 + 1 + 1) * 7 = 21
    ],
)
def test_known_hands(numbers, is_solvable):
    assert (24 in reachable(numbers)) == is_solvable


@pytest.mark.slow
def test_of_the_hands_of_four_numbers_up_to_ten_566_of_715_have_a_solution():
    hands = list(itertools.combinations_with_replacement(range(1, 11), 4))
    assert (len(hands), sum(24 in reachable(numbers) for numbers in hands)) == (715, 566)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=3))
def test_every_way_that_is_found_reads_as_its_value_and_uses_each_number_once(numbers):
    ways = reachable(tuple(sorted(numbers)))
    for value, expression in ways.items():
        found = read(expression.text)
        assert (found.value, sorted(found.numbers)) == (value, sorted(numbers))
    # A plain left-to-right search finds nothing beyond them.
    for order in itertools.permutations(numbers):
        for signs in itertools.product("+-*/", repeat=len(numbers) - 1):
            text = str(order[0]) + "".join(f"{s}{n}" for s, n in zip(signs, order[1:], strict=True))
            assert read(text).value in ways


def test_the_plainest_way_is_taken():
    # 2 * (3 + 9) stays in the natural numbers; 3 / (1 / 8), had it been found first, would not.
    assert reachable((2, 3, 9))[Fraction(24)].detours == 0
    assert reachable((3, 3, 8, 8))[Fraction(24)].text == "8 / (3 - 8 / 3)"


@pytest.mark.parametrize(
    "said",
    [
        "8 / (3 - 8 / 3) = 24",
        "8/(3-8/3)=24",
        "The answer is 8 / (3 - 8 / 3) = 24.",
        "Let me think: 3 * 8 = 24.\nThe answer is: **8 / (3 - 8 / 3)**.",
        "The answer is:\n\n$8 \\div (3 - 8 \\div 3) = 24$",
        "So \\boxed{8 \\div \\left(3 - \\frac{8}{3}\\right) = 24}",
        "\\[ \\frac{8}{3 - 8/3} = 24 \\]",
        "First 3 + 3 = 6, but then: 8 ÷ (3 − 8 ÷ 3) = 24",
        "8 ÷ (3 － 8 ÷ 3) = 24",
        "The answer is [8 / (3 - 8 / 3)] = 24, and I am sure of it.",
        "8 / (3 - 8 / 3) = 8 / (1 / 3) = 24",
        "3 * 8 = 24? No.\n<answer>8 / (3 - 8 / 3)</answer>",
        "<answer>The answer is \\boxed{8 / (3 - 8 / 3) = 24}</answer>",
    ],
)
def test_right_answers(said):
    assert outcome(hand(3, 3, 8, 8), said) == "correct"


def test_signs_of_multiplication():
    for sign in ("*", "×", "·", "\\times", "\\cdot", " x "):
        assert outcome(hand(2, 3, 4), f"The answer is $2 {sign} 3 {sign} 4 = 24$.") == "correct"


@pytest.mark.parametrize(
    "said",
    [
        "The answer is 4 * 6 = 24.",  # the other two are left out
        "4 * 6 * 1 * 1 * 1 = 24",  # a number twice
        "4 * 6 * (2 - 1) = 24",  # a number that is not there
        "4 * 6 * 1 * 1 = 25",  # not what it comes to
        "4 * 6 + 1 - 1 = 24 = 25",
        "4 + 6 + 1 + 1",  # 12
        "The answer is 24.",
        "24 = 4 * 6 * 1 * 1",  # the wanted form is the other way round
        "-1 * 4 * -6 * 1 = 24",  # signs are no operation of the game
        "4 * 6 * 1 ** 1 = 24",
        "4 * 6 * 1 ^ 1 = 24",
        "4 * 6 * 1 // 1 = 24",
        "4 * 6 * 1.0 * 1 = 24",
        "4 * 6 / (1 - 1) = 24",
        "1(4 * 6) * 1 = 24",  # a call, to Python
        "(" * 140 + "4" + ")" * 140,
    ],
)
def test_wrong_answers(said):
    assert outcome(hand(1, 1, 4, 6), said) == "wrong"


@pytest.mark.parametrize(
    "said",
    [
        "",
        "I cannot do it.",
        "The answer is twenty-four.",
        "4 6 = 24",
        "The answer is 4 * 6 * 1 * = 24",
        "04 * 6 * 1 * 1 = 24",
        "4! * 6",
        "sqrt(16)*6*1*1 = 24",
        "4 * 6 * " + "1 * " * 10_000 + "1 = 24",  # too long to be read
        "__import__('os').getpid()",
    ],
)
def test_unparseable_answers(said):
    assert outcome(hand(1, 1, 4, 6), said) == "unparseable"


def test_digits_that_stand_together_are_one_number():
    assert outcome(hand(4, 4, target=44), "44 = 44") == "wrong"
    assert outcome(hand(4, 4, target=44), "4 4 = 44") == "unparseable"


def test_powers_are_never_computed():
    with pytest.raises(NotArithmetic):
        read("9**9**9**9")


def test_the_last_statement_counts():
    assert read_equation("The answer is 1 + 2 = 3. No: the answer is 2 + 2 = 4.") == "2 + 2 = 4"
    assert read_equation("1 + 2 = 3, and 2 + 2 = 4\nThat is all.") == "2 + 2 = 4"
    assert read_equation("x4*6 = 24") is None


OPTIONS = [{}, {"cards": 3}, {"cards": 2, "target": 0}, {"face": "rank", "suits": "red"}, {"face": 10, "target": 10}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_worked_answers_and_golds_are_correct_and_no_problem_stands_twice(options):
    task = GeneralPoints(**options)
    problems = task.problems(30, seed=2)
    for told in ("worked", "gold"):
        verdicts = task.verify(problems, [getattr(problem, told) for problem in problems])
        assert [v for v in verdicts if not v.is_correct] == []
    assert len({(*sorted(p.entry["numbers"]), p.entry["target"]) for p in problems}) == 30
    assert [p.question for p in task.problems(30, seed=2)] == [p.question for p in problems]
    assert [p.question for p in task.problems(30, seed=3)] != [p.question for p in problems]


def test_the_question_says_the_cards_the_rule_and_the_target():
    problems = GeneralPoints(face="rank", suits="black").problems(40, seed=0)
    kings = [problem for problem in problems if "the king of" in problem.question]
    assert all(13 in problem.entry["numbers"] for problem in kings)
    assert kings
    assert not any("hearts" in problem.question or "diamonds" in problem.question for problem in problems)
    assert all("jack, queen and king count as 11, 12 and 13" in problem.question for problem in problems)
    assert all("to make 24." in problem.question for problem in problems)
    tens = GeneralPoints().problems(40, seed=0)
    assert max(number for problem in tens for number in problem.entry["numbers"]) == 10


def test_worked_answers_by_hand():
    # 6 is 1 + 5, 2 + 4, 3 + 3, 1 * 6, 2 * 3, 7 - 1, 8 - 2, 9 - 3 and 10 - 4: nine hands of two.
    problems = GeneralPoints(cards=2, target=6, suits="black").problems(9, seed=0)
    worked = {tuple(sorted(problem.entry["numbers"])): problem.worked for problem in problems}
    suits = "(spades|clubs)"
    assert re.fullmatch(
        rf"The cards are (the 2 of {suits}, the 3 of {suits}\. The numbers are 2, 3|"
        rf"the 3 of {suits}, the 2 of {suits}\. The numbers are 3, 2)\. 2 \* 3 = 6\. The answer is 2 \* 3 = 6\.",
        worked[2, 3],
    )
    ten = rf"the (10|jack|queen|king) of {suits}"
    assert re.match(
        rf"The cards are ({ten}, the 4 of {suits}\. The numbers are 10, 4|the 4 of {suits}, {ten}\. "
        rf"The numbers are 4, 10)\. 10 - 4 = 6\. The answer",
        worked[4, 10],
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cards": 5}, "cards = 5 is no option of general_points; give one of 2, 3, 4"),
        ({"face": "11"}, "face = '11' is no option of general_points; give one of 10, rank"),
        ({"suits": "green"}, "suits = 'green' is no option of general_points; give one of black, red, all"),
        ({"target": -1}, "target = -1 is no target"),
        ({"colour": 1}, "task general_points has no option 'colour'; its options are cards, target, face, suits"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(UserError, match=said):
        make_task("general_points", options)


def test_too_few_hands_are_refused_with_their_number():
    with pytest.raises(UserError, match="gives only 0 different problems, 5 were asked for; more cards, or target = 0"):
        GeneralPoints(cards=2, target=1000).problems(5, seed=0)
    with pytest.raises(UserError, match="gives only 9 different problems, 10 were asked for"):
        GeneralPoints(cards=2, target=6).problems(10, seed=0)


def test_the_small_task_has_enough_for_the_demo():
    assert len(make_task("general_points", {}, small=True).problems(800, seed=0)) == 800
