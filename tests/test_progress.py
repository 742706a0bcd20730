"""The terminal shows what models and data wrote as it is."""

import ast
from pathlib import Path

import pytest
from rich.rule import Rule
from rich.table import Table
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

import moe_bias
from moe_bias.progress import meter, text_console, without_bars_of_others

ODD = "[/b] [link=x]y[/link] [bold] :smile: \\[a] [@click=z]"


def test_every_text_is_printed_as_it_is(capsys):
    table = Table(ODD, title=ODD, caption=ODD)
    table.add_row(ODD)
    console = text_console(width=80)
    for shown in (ODD, Rule(ODD), table):
        console.print(shown)
    assert capsys.readouterr().out.count(ODD) == 6


def test_a_bar_shows_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with meter(ODD, 2, "answers") as bar:
        bar.advance(2)
        bar.note(ODD)
        bar.say(ODD)
    assert capsys.readouterr().err.count(ODD) >= 3


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_bar_stays_on_one_line(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with meter("answering held-out problems", 2, "sampled tokens") as bar:
        bar.advance(2)
        bar.note("loss 0.123, held-out 0.345")
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_bars_of_others_are_left_out_and_come_back(capsys):
    """Those of the conversion of a GGUF file too, which transformers makes by another name."""
    with without_bars_of_others():
        assert [*logging.tqdm("ab")] == [*modeling_gguf_pytorch_utils.tqdm("ab")] == ["a", "b"]
    assert capsys.readouterr().err == ""
    assert [*logging.tqdm("ab")] == [*modeling_gguf_pytorch_utils.tqdm("ab")] == ["a", "b"]
    assert capsys.readouterr().err.count("2/2") == 2


SOURCES = sorted(Path(moe_bias.__file__).parent.rglob("*.py"))


def called(path):
    """Names of the functions that a file calls."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {getattr(function, "id", getattr(function, "attr", "")) for function in calls}


def test_no_other_console_is_made_and_no_markup_read():
    assert [path.name for path in SOURCES if "Console" in called(path)] == ["progress.py"]
    assert [path.name for path in SOURCES if "from_markup" in called(path)] == []
