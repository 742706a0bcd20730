"""`moe-bias tasks`: what there is, and one of it."""

import re
import sys

import pytest

from helpers.complaints import complaint
from moe_bias.cli import main
from moe_bias.tasks.procedural import REFUSED

pytestmark = pytest.mark.usefixtures("folder")
OWN = """
import random

from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import judged


class Doubling:
    name = "doubling"

    def __init__(self, largest: int = 10):
        self.largest = largest

    def problems(self, count, seed):
        return [Problem(f"Twice {n}?", str(2 * n)) for n in random.Random(seed).sample(range(self.largest), count)]

    def verify(self, problems, completions):
        return [judged(problem.gold in text, text) for problem, text in zip(problems, completions)]


def demanding(words: list[str]): ...


ready = Doubling()
"""


@pytest.fixture
def own(folder, monkeypatch):
    """A module of tasks in the current folder, and a package that names two of them."""
    (folder / "own_doubling.py").write_text(OWN)
    metadata = folder / "doubling-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: doubling\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[moe_bias.tasks]\ntwice = own_doubling:Doubling\n")
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("own_doubling", None)


def said(capsys, *words: str) -> str:
    assert main(["tasks", *words]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table's rows by their first."""
    found = [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.startswith("  ")]
    return {row[0]: row[1:] for row in found if len(row) > 1}


def test_the_list(own, capsys):
    text = said(capsys)
    listed = rows(text)
    assert listed["general_points"] == ["built in", "A target from the numbers of a few cards"]
    assert listed["products"] == ["reasoning-gym", "Multiplication tasks with configurable number of terms"]
    assert listed["twice"] == ["doubling", "own_doubling:Doubling"]
    assert listed["calendar_arithmetic"] == ["reasoning-gym", "Arithmetic"]
    assert not listed.keys() & REFUSED.keys()
    assert f"{len(REFUSED)} more of reasoning-gym cannot serve as a reward: moe-bias tasks --refused" in text


def test_the_list_of_those_that_are_refused(own, capsys):
    listed = rows(said(capsys, "--refused"))
    assert listed.keys() >= REFUSED.keys()
    assert not listed.keys() & {"general_points", "products", "twice"}
    assert listed["countdown"] == ["reasoning-gym", REFUSED["countdown"]]


def test_the_list_without_reasoning_gym(own, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    text = said(capsys)
    assert {"general_points", "twice"} <= rows(text).keys()
    assert "The list of reasoning-gym's tasks needs reasoning-gym, which is not installed: pip" in text


@pytest.mark.parametrize(
    ("name", "option", "question", "gold"),
    [
        ("products", ["int", "5", "1"], "Solve the following multiplication: ", r"\d+"),
        ("general_points", ["int", "24", "0"], "You have three cards: ", r".* = \d+"),
        ("lcm", ["int", "100"], "Find the Least Common Multiple", r"\d+"),
        ("own_doubling:Doubling", ["int", "10"], "Twice ", r"\d+"),
        ("twice", ["int", "10"], "Twice ", r"\d+"),
    ],
)
def test_one_task(own, capsys, name, option, question, gold):
    text = said(capsys, name)
    assert option in rows(text).values()
    assert re.search(rf"^A problem.*:\n  {question}", text, re.MULTILINE)
    assert re.search(rf"^Its gold answer:\n  {gold} *$", text, re.MULTILINE)


def test_a_task_without_options(own, capsys):
    assert said(capsys, "own_doubling:ready").startswith("Task own_doubling:ready has no options.\nA problem:\n  Twice")


def test_a_task_whose_options_have_to_be_given(own, capsys):
    text = said(capsys, "own_doubling:demanding")
    assert rows(text)["words"] == ["list[str]", "has to be given"]
    assert text.endswith("It has to be given words, so no problem of it can be shown.\n")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("prodcts", "there is no task 'prodcts', looked for among 1 of installed packages (entry points 'moe_bias.ta"),
        ("countdown", "task 'countdown' is refused: its scorer runs the model's answers as code; take another"),
        ("own_doubling:Halving", "'own_doubling:Halving': own_doubling has no Halving"),
    ],
)
def test_what_there_is_not(own, capsys, name, sentence):
    assert complaint(capsys, "tasks", name).startswith(sentence)
