"""Options of tasks arrive in the types of the task's own config, from wherever they were written."""

import datetime
import json
import random
import warnings
from dataclasses import fields

import pytest

from helpers.complaints import complaint
from moe_bias.cli import main, settings_of
from moe_bias.mistakes import UserError
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.options import fitted
from moe_bias.tasks.procedural import REFUSED, ProceduralTask
from moe_bias.tasks.reading import make_dataset

pytestmark = pytest.mark.usefixtures("folder")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)
    from reasoning_gym.factory import DATASETS

OPTIONS = {"allow_negation": False, "max_terms": 3, "probability": 0.5, "name": "007", "operators": ["+", "-"]}
RUN_SETS = ("size", "seed")


def task_options():
    return settings_of(["eval", "--output", "o", "--task", "chain_sum"])[1].task_options


def test_types_of_a_settings_file_and_of_variables_stay(folder, monkeypatch):
    (folder / "moe-bias.toml").write_text(
        "[eval.task_options]\nallow_negation = false\n"
        'max_terms = 3\nprobability = 0.5\nname = "007"\noperators = ["+", "-"]'
    )
    found = task_options()
    assert json.dumps(found) == json.dumps(OPTIONS)
    (folder / "moe-bias.toml").unlink()
    monkeypatch.setenv("MOE_BIAS_TASK_OPTIONS", json.dumps(OPTIONS))
    assert json.dumps(task_options()) == json.dumps(OPTIONS)


@pytest.mark.parametrize("given", [False, "false", "False", "no", "off", "0", 0])
def test_false_is_false_however_it_is_written(given):
    assert fitted("chain_sum", DATASETS["chain_sum"][1], {"allow_negation": given}) == {"allow_negation": False}
    assert make_dataset("chain_sum", {"allow_negation": given}, 1, 0).config.allow_negation is False


@pytest.mark.parametrize("given", [True, "true", "yes", 1])
def test_true_is_true_however_it_is_written(given):
    assert make_dataset("chain_sum", {"allow_negation": given}, 1, 0).config.allow_negation is True


def written(value: object) -> object:
    """A value of a config as a settings file has it."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return getattr(value, "value", value)


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - REFUSED.keys()))
def test_every_task_takes_its_own_defaults_in_every_spelling(name):
    """As TOML has them, and as words on the command line."""
    config = DATASETS[name][1]()
    for field in fields(config):
        value = written(getattr(config, field.name))
        if field.name in RUN_SETS or isinstance(value, list | tuple) or type(value).__module__ != "builtins":
            continue
        spellings = {value, str(value), str(value).lower()} - {"none", "None"}
        if isinstance(value, str):
            spellings = {value}
        for spelling in spellings - ({None} if value is not None else set()):
            found = fitted(name, type(config), {field.name: spelling}, RUN_SETS)[field.name]
            assert found == getattr(config, field.name)
            assert type(found) is type(getattr(config, field.name)) or isinstance(found, int | float)


@pytest.mark.parametrize(
    ("task", "options", "sentence"),
    [
        (
            "chain_sum",
            {"allow_negation": "maybe"},
            "option allow_negation of task chain_sum is 'maybe': input should be a valid boolean, unable to interpret "
            "input",
        ),
        (
            "chain_sum",
            {"max_terms": True},
            "option max_terms of task chain_sum is True: input should be a valid integer",
        ),
        (
            "chain_sum",
            {"max_terms": 3.5},
            "option max_terms of task chain_sum is 3.5: input should be a valid integer",
        ),
        (
            "chain_sum",
            {"max_terms": "many"},
            "option max_terms of task chain_sum is 'many': input should be a valid integer, unable to parse string as "
            "an integer",
        ),
        (
            "caesar_cipher",
            {"delimiter": False},
            "option delimiter of task caesar_cipher is False: input should be a valid string",
        ),
        (
            "chain_sum",
            {"max_term": 3},
            "task chain_sum has no option 'max_term'; its options are min_terms, max_terms, min_digits, max_digits, "
            "allow_negation",
        ),
        (
            "chain_sum",
            {"seed": 3},
            "task chain_sum has no option 'seed'; its options are min_terms, max_terms, min_digits, max_digits, "
            "allow_negation",
        ),
        ("general_points", {"cards": "two"}, "option cards of task general_points is 'two': input should be a valid"),
        ("general_points", {"suits": False}, "option suits of task general_points is False: input should be a valid"),
    ],
)
def test_wrong_types_are_refused_by_name(task, options, sentence):
    with pytest.raises(UserError) as refused:
        make_task(task, options).problems(2, 0)
    assert str(refused.value).startswith(sentence)


def test_words_of_the_command_line(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("moe_bias.commands.evaluate.run", seen.append)
    words = ["--task-options", "allow_negation=false", "--task-options", "max_terms=3"]
    assert main(["eval", "--task", "chain_sum", "--output", "o", *words]) == 0
    assert fitted("chain_sum", DATASETS["chain_sum"][1], seen[0].task_options) == {
        "allow_negation": False,
        "max_terms": 3,
    }
    monkeypatch.undo()
    words = ["eval", "--task", "chain_sum", "--output", "o", "--task-options", "allow_negation=perhaps"]
    assert complaint(capsys, *words).startswith("option allow_negation of task chain_sum is 'perhaps': input should be")


def test_options_reach_the_scorer_in_their_types():
    """The grader's process is given them as they were written."""
    task = ProceduralTask("time_intervals", {"min_date": "2000-01-01", "max_date": "2001-01-01"})
    problem = task.problems(1, random.Random(0).randrange(100))[0]
    assert task.verify([problem], [f"The answer is {problem.gold}."])[0].is_correct
