r"""Reading data sets of problems, and a hundred real answers with what math-verify makes of them.

The table says what happens, not what one might wish: where the grader is more lenient or stricter than a teacher, a
comment says so.
"""

import json
import os
import subprocess
import sys
import time

import pytest

from moe_bias.mistakes import UserError
from moe_bias.tasks.answers import answer_place, last_boxed
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.grader import Grader
from moe_bias.tasks.mathematics import INSTRUCTION, Columns, data_task, gold_answer

CORRECT = r"""
72 | The answer is 72.
72 | #### 72
-3 | \boxed{−3}
-3 | The answer is −3.
-3 | The answer is –3.
-3 | \boxed{－3}
-3 | #### −3
−3 | \boxed{-3}
−3 | −3
-\frac{1}{2} | $−\frac{1}{2}$
x-3 | \boxed{x − 3}
(3,500) | \boxed{(3, 500)}
(3,500) | #### (3,500)
72 | So she has 72 eggs left
72 | \boxed{72}.
72 | $\boxed{72}$
72 | The answer is **72**.
1234 | 1,234
1234 | $1,234$
1234 | 1234.0
1234 | 1 234
1,234 | \boxed{1234}
1234567 | \boxed{1{,}234{,}567}
1234567 | \boxed{1,234,567}
10000 | 10^4
1.5 | 1,5
33 | \boxed{033}
033 | \boxed{33}
1/2 | 0.5
\frac{1}{2} | 1/2
\frac{1}{2} | $\frac12$
\frac{1}{2} | \boxed{\dfrac{1}{2}}
\frac{1}{2} | \boxed{\frac{2}{4}}
\frac{1}{2} | $.5$
-\frac{3}{4} | $\frac{-3}{4}$
\frac{7}{2} | \boxed{3\frac{1}{2}}
3\frac{1}{2} | \boxed{3.5}
\sqrt{2} | \boxed{\sqrt2}
2\sqrt{2} | \boxed{\sqrt{8}}
\frac{\sqrt{2}}{2} | \boxed{\frac{1}{\sqrt{2}}}
2\pi | \boxed{2π}
5! | \boxed{120}
2^{10} | 1024
\binom{5}{2} | \boxed{10}
\log_2 8 | \boxed{3}
25\% | \boxed{25\%}
25\% | 0.25
\$18.90 | \boxed{\$18.90}
18.90 | $18.9
5 | $5$ dollars
12 | \boxed{12\text{ cm}^2}
12 \text{ cm} | \boxed{12}
90^\circ | \boxed{90}
90 | \boxed{90^{\circ}}
\{1,2,3\} | \boxed{\{3,2,1\}}
\{1,2,3\} | \boxed{1,2,3}
1,2 | \boxed{2,1}
1,2 | $x=1$ or $x=2$
1,2 | $\boxed{1}$ and $\boxed{2}$
2 | First \boxed{1}. Then I checked again. So \boxed{2}
(1,2) | \boxed{\left(1, 2\right)}
[1,2) | \boxed{[1,2)}
(-\infty,3] | \boxed{(-\infty, 3]}
x \le 3 | \boxed{(-\infty, 3]}
x \le 3 | \boxed{3 \ge x}
(-\infty,1)\cup(2,\infty) | \boxed{(2,\infty)\cup(-\infty,1)}
5 | \boxed{x=5}
x=5 | \boxed{5}
x^2+2x+1 | \boxed{(x+1)^2}
y=2x+1 | \boxed{y-2x=1}
\frac{x}{2} | \boxed{0.5x}
\text{Evelyn} | \boxed{\text{Evelyn}}
\text{Evelyn} | \boxed{Evelyn}
\text{(C)} | \boxed{C}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \boxed{\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}}
\begin{pmatrix} 1/2 \\ 3 \end{pmatrix} | \boxed{\begin{pmatrix} 0.5 \\ 3 \end{pmatrix}}
3+4i | \boxed{4i+3}
2516_8 | \boxed{2516_{8}}
3:2 | \boxed{\frac{3}{2}}
73 | \boxed{\textbf{(073)}}
82 | \boxed{\text{082}}
082 | \boxed{\text{82}}
\text{(073)} | \boxed{73}
73 | \boxed{73.}
73 | \framebox{73}
\frac{1}{29,\!322,\!216} | \boxed{\frac{1}{29322216}}
20,\!000 | \boxed{20,\!000}
\frac{1}{2} | So $x = \boxed{\frac{1}{2}.}$
73 | <think>71?</think> <answer>73</answer>
73 | The answer is 71. <answer> 73 </answer>
73 | <answer>The answer is 73.</answer>
73 | <answer>73 eggs</answer>
\frac{1}{2} | <answer>\boxed{\frac{2}{4}}</answer>
\text{Evelyn} | <answer>Evelyn</answer>
72 | Her answer to 5 of them is no.\n#### 72
72 | The answer is 48 + 24.\n#### 72
1200 | They say the answer: 5.\n#### 1,200\n
18 | Her answer is 5 a day.\n#### $18
6 m | \boxed{6 m}
6 m | \boxed{6\text{ m}}
6 m | \boxed{6}
6 m | The answer is 6 meters.
6 m | \boxed{600\text{ cm}}
6 m | There are 6 in all.
6\text{ km} | \boxed{6000\ \mathrm{m}}
6 m^2 | \boxed{6\text{ m}^2}
6 m^2 | \boxed{6}
6\text{ square meters} | \boxed{6 \mathrm{~m}^{2}}
36 \text{ km/h} | \boxed{10\text{ m/s}}
36 km/h | The answer is 36 kilometers per hour.
52_8 | \boxed{52_8}
52_8 | \boxed{52_{\text{eight}}}
52_{\text{eight}} | \boxed{52_{8}}
52_8 | The answer is 52_8.
-52_8 | \boxed{-52_{8}}
a_1 + b_2 | \boxed{b_2 + a_1}
x_1 | \boxed{x_1}
1A3_{16} | \boxed{1a3_{\text{base }16}}
a + b + c | \boxed{c + b + a}
\sin^2 t | \boxed{\sin^2 t}
1e-5 | 0.00001
1e-5 | \boxed{10^{-5}}
2.5E3 | 2,500
0.00001 | 1e-05
0.00001 | The answer is 1E-5.
0.00001 | \boxed{1 \times 10^{-5}}
602000000000000000000000 | \boxed{6.02 \times 10^{23}}
602000000000000000000000 | The answer is 6.02 x 10^23.
602000000000000000000000 | 6.02e23
-602000000000000000000000 | The answer is -6.02 × 10^23.
-602000000000000000000000 | -6.02e23
-0.00001 | -10**(-5)
3^{3^{3^3}} | \boxed{3^{3^{3^3}}}
2^{2004}-1 | \boxed{2^{2004} - 1}
10^{400} | \boxed{1000 \times 10^{397}}
10^{400} km | \boxed{10^{400} \text{ km}}
\infty | \boxed{\infty}
10000000000000000 | 10^{16}
0.0000005 | \frac{1}{2000000}
"""
LENIENT = r"""
12 | \boxed{3 \times 4}
12 | 10 + 2
\frac{1}{3} | 0.333333
\sqrt{2} | \boxed{1.41421356}
\pi | 3.14159265
25\% | 25
25 | 25\%
12 | \boxed{12\text{ kg}}
12 \text{ apples} | \boxed{12\text{ pears}}
(1,2) | \boxed{1,2}
2516_8 | \boxed{2516}
2516 | \boxed{2516_8}
2x+1 | \boxed{y=2x+1}
"""
"""Counted as correct though one may object: sums left to do, six decimals, a lost percent sign, a unit that the gold
answer does not have or that is none of physics, a point without parentheses, a number without its base, an equation for
an expression."""
WRONG = r"""
72 | 71
72 | The answer is -72.
72 | We know 72, so the answer is 71.
\frac{1}{3} | 0.33
-\frac{3}{4} | $\frac{3}{4}$
\pi | 3.14
\{1,2,3\} | \boxed{\{1,2\}}
1 | First \boxed{1}. Then I checked again. So \boxed{2}
(1,2) | \boxed{(2,1)}
(1,2) | \boxed{[1,2]}
[1,2) | \boxed{(1,2]}
x < 3 | \boxed{x \le 3}
x=5 | \boxed{y=5}
x^2+2x+1 | \boxed{x^2+2x}
3x | \boxed{3y}
\text{Evelyn} | \boxed{\text{Carla}}
\text{(C)} | \boxed{\text{(D)}}
\text{even} | \boxed{\text{odd}}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \boxed{\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}}
3+4i | \boxed{3-4i}
0 | \boxed{0.0000001}
73 | <answer>71</answer> or \boxed{73}
72 | The answer is 72.\n#### 48
12 \text{ cm} | \boxed{12\text{ kg}}
6 m | \boxed{6\text{ cm}}
6 m | The answer is 6 km.
6 m | \boxed{600}
6 m^2 | \boxed{6\text{ m}}
36 km/h | \boxed{36\text{ m/s}}
52_8 | \boxed{52_9}
52_8 | \boxed{53_8}
52_8 | \boxed{-52_8}
a_1 + b_2 | \boxed{a_3 + b_2}
x_1 | \boxed{x_2}
52_8 | The answer is 52_{10}.
1A3_{16} | \boxed{1A4_{16}}
a + b + c | \boxed{a + b}
0.00001 | 0.00002
0.00001 | 1
0.0000005 | 0.0000004
0.0000005 | 0
\frac{1}{2000000} | 0.0000004
602000000000000000000000 | 6.02e22
10^{400} | 1e300
602000000000000000000000 | The answer is -6.02 x 10^23.
300 | 3 x 10^2 + 1
602000000000000000000000 | 602000000000000000000001
"""
STRICT = r"""
\frac{7}{2} | 3 1/2
11\sqrt{2} | 11√2
\emptyset | \boxed{\varnothing}
(-\infty,3] | \boxed{x \le 3}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \boxed{(1,2)}
12 | \boxed{\text{twelve}}
1 | \boxed{1.0000001}
33 | 32 / 96 * 100% = 33.333...%, which rounds down to 33%, and so to the answer: 33.333
"""
"""Counted as wrong though one may object: a mixed number without LaTeX, a root as a sign, the other sign of the empty
set, an inequality for an interval (but not the other way round), a column as a row, a number in words, and the answer
that stands elsewhere than the last "answer"."""
UNPARSEABLE = r"""
12 | I do not know.
12 | \boxed{}
12 |
12 | The answer is twelve.
12 | ???
\text{Evelyn} | The answer is Evelyn.
C | The answer is C.
18.90 | The cost is \$18.90.
"""
"""Words and letters are read in LaTeX alone; an escaped dollar sign opens no LaTeX and hides the number."""
BAD_GOLD = r"""
\frac{1}{ | 12
\text{( | \text{(
 | 12
#### | 12
"""


def rows(table: str, outcome: str) -> list[tuple[str, str, str]]:
    """Gold answer, completion and outcome of each line."""
    parted = (line.partition("|") for line in table.strip("\n").split("\n"))
    return [(gold.strip(), completion.strip().replace("\\n#", "\n#"), outcome) for gold, _, completion in parted]


CASES = [
    *rows(CORRECT + LENIENT.lstrip("\n"), "correct"),
    *rows(WRONG + STRICT.lstrip("\n"), "wrong"),
    *rows(UNPARSEABLE, "unparseable"),
    *rows(BAD_GOLD, "bad gold"),
]


def graded(grader, *pairs):
    return grader.grade("mathematics", [{"gold": gold, "completion": completion} for gold, completion in pairs])


@pytest.fixture(scope="module")
def grader():
    grader = Grader(workers=1)
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def verdicts(grader):
    return graded(grader, *[(gold, completion) for gold, completion, _ in CASES])


def test_the_table_holds_more_than_a_hundred_cases():
    assert len(CASES) == len(set(CASES)) > 100


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " | ".join(CASES[number][:2]))
def test_answers(verdicts, number):
    verdict, (_, _, outcome) = verdicts[number], CASES[number]
    assert verdict.outcome == outcome
    assert verdict.reward == (outcome == "correct")
    assert (verdict.answer is None) == (outcome in ("unparseable", "bad gold"))


def test_the_answer_is_kept_as_text(grader):
    one, both = graded(grader, ("1/2", r"so \boxed{\frac{2}{4}} of it"), ("1,2", r"$x=1$ or $x=2$"))
    assert (one.answer, both.answer) == (r"\frac{2}{4}", "x=1 and x=2")


def test_a_process_that_was_killed_is_replaced_and_so_is_one_that_hangs(monkeypatch):
    started_process, processes = subprocess.Popen, []

    def start(*arguments, **choices):
        processes.append(started_process(*arguments, **choices))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    grader = Grader(limit=1.0, workers=1)
    assert graded(grader, ("12", "12"))[0].is_correct
    (process,) = processes
    process.kill()
    process.wait()
    started = time.monotonic()
    hung, *others = graded(grader, ("12", r"\boxed{9^{9^{9^9}}}"), ("12", "12"), ("13", "12"))
    assert (hung.outcome, hung.answer) == ("timed out", r"9^{9^{9^9}}")
    assert [verdict.outcome for verdict in others] == ["correct", "wrong"]
    assert time.monotonic() - started > 1  # it had its whole second
    assert len(processes) == 3
    grader.close()


def test_the_process_ends_with_its_input_and_knows_no_torch():
    run = "import sys; sys.argv, sys.stdin = ['', '1'], []; from moe_bias.tasks import grading_worker as worker; "
    run += "worker.main(); "
    seen = "print([name for name in ('torch', 'transformers', 'reasoning_gym', 'sympy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", run + seen], capture_output=True, text=True, timeout=60)
    assert done.stdout == '{"ready": true}\n[]\n'


def test_a_scorer_that_ends_its_process_at_once_is_an_error_of_ours(capfd):
    with pytest.raises(RuntimeError, match="the grading process ended before it looked at an answer; its error is"):
        Grader(workers=1).grade("no such scorer", [{}])
    assert capfd.readouterr().err.count("KeyError: 'no such scorer'") == 3


def test_long_answers_of_large_numbers_are_graded_in_time(grader):
    (verdict,) = graded(grader, ("12", "1e999 " * 3000))
    assert verdict.outcome == "wrong"


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def test_each_data_set_is_read_by_its_usual_columns(tmp_path, grader):
    dapo = {
        "prompt": [{"role": "user", "content": "What is 30 + 4?\n\nEnd with Answer: ..."}],
        "reward_model": {"ground_truth": "34", "style": "rule"},
    }
    source = write(
        tmp_path / "mixed.jsonl",
        {"problem": "Half of 3?", "solution": "It is $\\boxed{\\frac{3}{2}}$.", "answer": "\\frac{3}{2}"},
        {"problem": "Third of 3?", "solution": "It is $\\boxed{1}$."},
        {"question": "2 of 600?", "answer": "They are 2 * 600 = <<2*600=1200>>1,200.\n#### 1,200"},
        {"problem": "A line\u2028separator?", "answer": 204},
        {"problem": "One of a list?", "final_answer": ["7"]},
        dapo,
    )
    task = data_task(source, grader=grader)
    problems = list(task.all_problems)
    assert [problem.gold for problem in problems] == [r"\frac{3}{2}", "1", "1200", "204", "7", "34"]
    assert problems[0].question == f"Half of 3?\n\n{INSTRUCTION}"
    assert problems[5].question == "What is 30 + 4?\n\nEnd with Answer: ..."  # it says itself what it wants
    assert [bool(problem.worked) for problem in problems] == [True, True, True, False, False, False]
    assert problems[2].worked == "They are 2 * 600 = 1,200.\nThe answer is \\boxed{1200}."
    assert all(verdict.is_correct for verdict in task.verify(problems[:3], [p.worked for p in problems[:3]]))


@pytest.mark.parametrize(
    ("number", "gold", "spellings"),
    [
        ("1e-05", "0.00001", ["1e-5", r"\boxed{10^{-5}}", r"$\frac{1}{100000}$", "0.00001"]),
        ("5e-07", "0.0000005", ["5E-7", r"\boxed{5 \times 10^{-7}}", r"\boxed{0.5 \cdot 10^{-6}}"]),
        ("1e+16", "10000000000000000", ["1e16", r"\boxed{10^{16}}", "10,000,000,000,000,000"]),
        ("6.02e23", "602000000000000000000000", ["6.02e23", r"\boxed{6.02 \times 10^{23}}", "6.02 x 10^23"]),
        ("3.0", "3", ["3", "3.0", r"\boxed{3}"]),
        ("10000000000000000000000", "10000000000000000000000", ["1e22", r"\boxed{10^{22}}"]),
        ("0.3333333333333333", "0.333333333333333", ["1/3", r"\boxed{\frac{1}{3}}", "0.3333333333333333"]),
        ("0.30000000000000004", "0.3", ["0.3", r"\boxed{\frac{3}{10}}", "0.30000000000000004"]),
        ("-0.1", "-0.1", ["-0.1", "-1/10"]),
        ("true", r"\text{True}", [r"\boxed{\text{True}}", r"\boxed{true}", "<answer>True</answer>"]),
        ('"1e-5"', "1e-5", ["0.00001", "1e-05", r"\boxed{10^{-5}}"]),
        ('"2.5E3"', "2.5E3", ["2500", "2,500", r"\boxed{2.5 \times 10^3}"]),
    ],
)
def test_numbers_as_gold_answers_are_matched_in_every_usual_spelling(tmp_path, grader, number, gold, spellings):
    source = tmp_path / "numbers.jsonl"
    source.write_text(f'{{"question": "Which number?", "answer": {number}}}\n')
    task = data_task(str(source), grader=grader)
    (problem,) = task.all_problems
    assert problem.gold == gold
    verdicts = task.verify([problem] * len(spellings), spellings)
    assert [text for text, verdict in zip(spellings, verdicts, strict=True) if not verdict.is_correct] == []
    wrong = task.verify([problem] * 3, ["7", r"\boxed{\text{False}}", r"\boxed{-8 \times 10^{-7}}"])
    assert not any(verdict.is_correct for verdict in wrong)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        ("NaN", "has nothing in its column 'answer'"),
        ("null", "has nothing in its column 'answer'"),
        ("Infinity", "has a gold answer that is neither text nor a number: "),
        ("-Infinity", "has a gold answer that is neither text nor a number: "),
    ],
)
def test_gold_answers_that_are_no_numbers_are_refused_by_their_row(tmp_path, number, reason):
    source = tmp_path / "numbers.jsonl"
    source.write_text(f'{{"question": "Which number?", "answer": {number}}}\n')
    with pytest.raises(UserError, match=f"row 1 of .* {reason}"):
        data_task(str(source))


def test_columns_can_be_named_by_their_paths(tmp_path, grader):
    source = write(tmp_path / "own.jsonl", {"task": {"text": "1 + 1?"}, "key": {"value": 2}, "why": "because"})
    columns = Columns("task.text", "key.value", "why")
    (problem,) = data_task(source, columns=columns, instruction="", grader=grader).all_problems
    assert (problem.question, problem.gold) == ("1 + 1?", "2")


def test_a_context_belongs_to_its_question(tmp_path, grader):
    about = {"question": "How many?", "answer": 2, "context": "There are two."}
    source = write(tmp_path / "own.jsonl", about, {**about, "context": None}, {**about, "context": "There are 2."})
    problems = data_task(source, instruction="", grader=grader).all_problems
    questions = ["How many?\n\nThere are two.", "How many?", "How many?\n\nThere are 2."]
    assert [problem.question for problem in problems] == questions
    (alone,) = data_task(source, columns=Columns("question"), instruction="", grader=grader).all_problems
    assert alone.question == "How many?"
    with pytest.raises(UserError, match=r"row 1 of .*: context is not text but \['two'\]"):
        data_task(write(tmp_path / "list.jsonl", {**about, "context": ["two"]}), grader=grader)


def test_draws_are_different_questions_decided_by_the_seed(tmp_path, grader):
    numbered = [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(30)]
    task = data_task(write(tmp_path / "sums.jsonl", *numbered, *numbered), grader=grader)
    drawn = task.problems(20, seed=3)
    assert len({problem.question for problem in drawn}) == 20
    assert drawn == task.problems(20, seed=3) != task.problems(20, seed=4)
    with pytest.raises(UserError, match="gives only 30 different problems, 31 were asked for"):
        task.problems(31, seed=0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "1 + 1?"}, r"row 1 of .* has columns \['text'\]; needed is problem or question or prompt"),
        ({"problem": "1 + 1?"}, "needed is answer or ground_truth or"),
        ({"problem": ["1 + 1?", "2"], "answer": "2"}, "neither text nor one message of the user"),
        ({"problem": ["1 + 1?"], "answer": "2"}, "row 1 of .*: the question is not a message with role and content"),
        ({"problem": 17, "answer": "2"}, "neither text nor one message of the user: 17"),
        ({"problem": "1 + 1?", "answer": float("nan")}, "needed is answer or ground_truth or"),
        ({"problem": "1 + 1?", "answer": {"a": 2}}, "a gold answer that is neither text nor a number"),
        ([1, 2], "is not an object with columns"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        data_task(write(tmp_path / "odd.jsonl", row))


def test_half_a_character_is_named(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"problem": "1 + \ud83d?", "answer": "2"}))
    with pytest.raises(UserError, match=r"row 1 of .*: the question holds '\\ud83d', half of a character"):
        data_task(str(path))


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{1} } \boxed{{2}} {", "{2}"),
        (r"\boxed{1 \boxed{2} 3}", "2"),
        (r"\boxed{1 {2}", None),
        (r"\boxed{1} \fbox{2} \framebox{3}", "3"),
        ("none", None),
        (r"\boxed{}", ""),
        (r"\boxed{" * 2000 + "7", None),
        (r"\boxed{" * 2000 + "7" + "}" * 2000, "7"),
        (r"\boxed{7}" + r"\boxed{" * 2000, "7"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_last_boxed(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("The answer is 4.", " 4."),
        ("**Final answer:** 4", " 4"),
        ("The answer is: 4. Its answer is: 5", " 5"),
        (r"\boxed{4}, so the answer is 5", "4"),
        (r"\boxed{5} <answer>\boxed{4}</answer> <answer>", "4"),
        ("<answer>3</answer><answer>4</answer>", "4"),
        ("<answer>the answer is 4</answer>", " 4"),
        ("</answer> 4 <answer>", None),
        ("The answer isn't known", None),
        ("4", None),
    ],
)
def test_where_a_completion_states_its_answer(text, place):
    assert answer_place(text) == place


def test_gold_answers_of_data_sets():
    assert gold_answer("4 + 4 = <<4+4=8>>8\n#### 1,008") == "1008"
    assert gold_answer("#### 1,234,567") == "1234567"
    assert gold_answer("#### (1,2)") == "(1,2)"
    for listed in (
        "(3, 5)",
        "(3,500)",
        "[100,200]",
        r"\{100,200,300\}",
        "1,2",
        "1, 200",
        "3,5000",
        "1,200,30",
        "0.5,125",
    ):
        assert gold_answer(f"#### {listed}") == listed
    assert gold_answer("#### -$1,200.50 for 3") == "-$1200.50 for 3"
    assert gold_answer(r"so $\boxed{\text{(A)}}$.") == r"\text{(A)}"
    assert gold_answer(" 1,2 ") == "1,2"
    assert gold_answer(r"30^\circ.") == r"30^\circ"


def test_a_task_by_name():
    assert make_task("products", {"max_terms": 3}).options == {"max_terms": 3}
    assert make_task("general_points", {"cards": 3}).cards == 3


@pytest.mark.slow
def test_math500_grades_its_own_solutions_as_correct():
    source = os.environ.get("MATH500_FILE")
    if not source:
        pytest.skip("MATH500_FILE names no file of MATH-500's problems, answers and solutions")
    task = data_task(source)
    problems = list(task.all_problems)
    verdicts = task.verify(problems, [problem.worked for problem in problems])
    missed = [(p.gold, v) for p, v in zip(problems, verdicts, strict=True) if not v.is_correct]
    assert (len(problems), missed) == (500, [])


@pytest.mark.slow
def test_gsm8k_grades_its_own_solutions_as_they_end_as_correct(grader):
    source = os.environ.get("GSM8K_FILE")
    if not source:
        pytest.skip("GSM8K_FILE names no file of GSM8K's test problems")
    problems = data_task(source).all_problems
    verdicts = graded(grader, *[(problem.gold, problem.entry["answer"]) for problem in problems])
    missed = [(p.gold, v) for p, v in zip(problems, verdicts, strict=True) if not v.is_correct]
    assert (len(problems), missed) == (1319, [])
