"""A user's own task: made from what is given, and held to the protocol before anything long begins."""

import sys
from types import SimpleNamespace

import pytest

from moe_bias.mistakes import UserError
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.general_points import GeneralPoints
from moe_bias.tasks.options import fitted, options_of
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import Verdict, judged

MODULE = """
import random
from dataclasses import dataclass

from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import judged


@dataclass
class Doubling:
    largest: int = 1000
    name: str = "doubling"

    def problems(self, count, seed):
        numbers = random.Random(seed).sample(range(self.largest), count)
        return [Problem(f"Twice {number}?", str(2 * number)) for number in numbers]

    def verify(self, problems, completions):
        return [judged(text.endswith(problem.gold), text) for problem, text in zip(problems, completions)]


class Plain:
    name = "plain"

    def __init__(self, words: list[str], limit=3, *, loud: bool = False, **more):
        self.given = words, limit, loud, more

    def problems(self, count, seed): ...
    def verify(self, problems, completions): ...


def doubling(largest: int = 10) -> Doubling:
    return Doubling(largest)


def raising(word="a"):
    return {}[word]


def without_verify():
    class Half:
        name = "half"
        def problems(self, count, seed): ...
    return Half()


ready = Doubling(50)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module of tasks in the current folder."""
    (tmp_path / "own_tasks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_tasks", None)


@pytest.mark.parametrize(
    ("given", "options", "largest"),
    [
        ("own_tasks:Doubling", {}, 1000),
        ("own_tasks:Doubling", {"largest": "30"}, 30),
        ("own_tasks:Doubling", {"largest": 30}, 30),
        ("own_tasks:doubling", {}, 10),
        ("own_tasks:doubling", {"largest": 30}, 30),
        ("own_tasks:ready", {}, 50),
    ],
)
def test_a_class_a_function_and_an_object(own, given, options, largest):
    task = make_task(given, options, small=True)
    problems = task.problems(5, 0)
    assert task.name == "doubling"
    assert problems == task.problems(5, 0) != task.problems(5, 1)
    assert all(int(problem.gold) < 2 * largest for problem in problems)
    assert [verdict.outcome for verdict in task.verify(problems[:2], [problems[0].gold, "no"])] == ["correct", "wrong"]


def test_objects_and_classes_of_python(own):
    make_task("own_tasks:ready", {})
    own_tasks = sys.modules["own_tasks"]
    for given in (own_tasks.Doubling, own_tasks.Doubling(20), own_tasks.doubling):
        assert len(make_task(given, {}).problems(5, 0)) == 5
    assert make_task(own_tasks.Doubling, {"largest": 7}).problems(7, 0)


def test_a_task_of_ours_stays_as_it_is():
    task = GeneralPoints()
    assert make_task(task, {}) is task


def test_a_task_of_a_package(own, monkeypatch):
    metadata = own / "doubling-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: doubling\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[moe_bias.tasks]\ntwice = own_tasks:Doubling\n")
    monkeypatch.syspath_prepend(own)
    assert len(make_task("twice", {"largest": 20}).problems(20, 0)) == 20
    with pytest.raises(UserError, match=r"there is no task 'twise', .* among 1 of .*; did you mean 'twice'\?"):
        make_task("twise", {}).problems(2, 0)


def test_options_of_every_kind_of_maker(own):
    make_task("own_tasks:ready", {})
    plain = sys.modules["own_tasks"].Plain
    known = {name: (option.type_name, option.default) for name, option in options_of(plain).items()}
    assert known["words"][0] == "list[str]"
    assert known["limit"] == ("int", 3)
    assert known["loud"] == ("bool", False)
    given = {"words": ["a"], "limit": "4", "loud": "yes", "colour": "red"}
    assert fitted("plain", plain, given) == {"words": ["a"], "limit": 4, "loud": True, "colour": "red"}


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        ("own_tasks:Doublings", {}, "'own_tasks:Doublings': own_tasks has no Doublings; did you mean 'Doubling'?"),
        (
            "own_tasks:Doubling",
            {"larges": 3},
            "task own_tasks:Doubling has no option 'larges'; its options are largest, name; did you mean 'largest'?",
        ),
        ("own_tasks:Doubling", {"largest": "x"}, "option largest of task own_tasks:Doubling is 'x': input should be a"),
        ("own_tasks:Plain", {"limit": 1}, "task own_tasks:Plain has to be given words among its options"),
        ("own_tasks:without_verify", {"a": 1}, "task own_tasks:without_verify has no option 'a'; it has none"),
        ("own_tasks:ready", {"largest": 3}, "task own_tasks:ready is an object and takes no options, not largest"),
        (
            "own_tasks:without_verify",
            {},
            "own_tasks:without_verify is no task: its Half has no verify(problems, completions)",
        ),
        ("own_tasks:__name__", {}, "own_tasks:__name__ is no task: its str has no name and no problems(count, seed)"),
        ("own_tasks:raising", {}, "task own_tasks:raising cannot be made: KeyError: 'a' (own_tasks.py, line 37)"),
        ("own_tasks:raising", {"word": "b"}, "task own_tasks:raising cannot be made with {'word': 'b'}: KeyError: 'b'"),
    ],
)
def test_what_is_no_task_is_refused(own, given, options, sentence):
    with pytest.raises(UserError) as refused:
        make_task(given, options)
    assert str(refused.value).startswith(sentence)


def problems_of(count: int, seed: int) -> list[Problem]:
    return [Problem(f"{seed}.{number}", "1") for number in range(count)]


def verdicts_of(problems: list[Problem], completions: list[str]) -> list[Verdict]:
    return [judged(True, text) for text in completions]


DRAWN: list[int] = []


def other_each_time(count: int, seed: int) -> list[Problem]:
    DRAWN.append(seed)
    return problems_of(count, len(DRAWN))


def failing(*given: object) -> None:
    raise KeyError("gold")


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"problems": failing}, "problems failed with KeyError: 'gold' (test_own_task.py, line "),
        ({"verify": failing}, "verify failed with KeyError: 'gold' (test_own_task.py, line "),
        ({"problems": lambda count, seed: None}, "problems gave None, which is no list"),
        ({"problems": lambda count, seed: "ab"}, "problems gave 'ab', which is no list"),
        ({"problems": lambda count, seed: [{"question": "?"}]}, "problems gave {'question': '?'}, which is no Problem"),
        ({"problems": lambda count, seed: [Problem("?", 3)]}, "question and gold answer are texts, not ('?', 3)"),
        ({"problems": lambda count, seed: problems_of(count - 1, seed)}, "gives only 2 different problems, 3 were ask"),
        ({"problems": lambda count, seed: problems_of(count + 1, seed)}, "problems gave 4, 3 were asked for"),
        ({"problems": lambda count, seed: [Problem("?", "1")] * count}, "problems gave '?' 3 times; no question may"),
        ({"problems": other_each_time}, "draws other problems each time for one seed; draw them by random.Random"),
        ({"verify": lambda problems, completions: []}, "verify gave 0 verdicts for 1 completions"),
        ({"verify": lambda problems, completions: [1.0]}, "verify gave 1.0, which is no Verdict"),
        (
            {"verify": lambda problems, completions: [Verdict("right", "a", 1.0)]},
            "verify gave the outcome 'right', which is none of 'correct', 'wrong', 'unparseable', 'timed",
        ),
        (
            {"verify": lambda problems, completions: [Verdict("correct", "a", 2.0)]},
            "verify gave a reward of 2.0, which is not a number from 0 to 1",
        ),
    ],
)
def test_what_a_task_gives_is_looked_at_as_problems_are_drawn(members, sentence):
    task = make_task(SimpleNamespace(**{"name": "own", "problems": problems_of, "verify": verdicts_of, **members}), {})
    with pytest.raises(UserError) as refused:
        task.problems(3, 0)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith("task types:SimpleNamespace")


def test_an_interrupt_is_no_fault_of_the_task():
    def interrupted(count: int, seed: int) -> None:
        raise KeyboardInterrupt

    task = make_task(SimpleNamespace(name="own", problems=interrupted, verify=verdicts_of), {})
    with pytest.raises(KeyboardInterrupt):
        task.problems(3, 0)


def test_a_name_that_is_no_text():
    with pytest.raises(UserError, match="types:SimpleNamespace is no task: its name is 3, which is no text"):
        make_task(SimpleNamespace(name=3, problems=problems_of, verify=verdicts_of), {})
