"""One table, written by hand, as a terminal, Markdown, LaTeX and a data frame have it."""

import json
from pathlib import Path

from moe_bias.evaluation.statistics import Estimate
from moe_bias.experiments.cells import Row
from moe_bias.progress import text_console
from moe_bias.report.latex import latex
from moe_bias.report.table import Column, Table
from moe_bias.report.tables import likelihoods, solved
from moe_bias.report.terminal import terminal_table

RECORDS = Path(__file__).parents[2] / "records"
NAME = Column("arm", ("name",), words=True)
NLL = Column("NLL", ("nll", "all"), "{:.2f}")
CHANGE = Column("change", ("change", "all"), "{:+.1%}", below="NLL")
ROWS = [
    {"name": "base", "nll": {"all": {"value": 1.0, "low": 0.5, "high": 1.5}}, "change": None, "count": 1234},
    {
        "name": "mine",
        "nll": {"all": {"value": 2.0, "low": None, "high": None}},
        "change": {"all": {"value": 0.5, "low": -0.25, "high": 0.75}},
        "count": 5,
    },
]


def printed(table: Table, stacked: bool = False) -> list[str]:
    console = text_console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(terminal_table(table, stacked))
    return [line[1:-1].strip() for line in captured.get().splitlines() if line.startswith("│")]


def test_cells_are_written_by_their_columns():
    table = Table(
        "t", "", [NAME, NLL, CHANGE, Column("count", ("count",), "{:,}"), Column("half", ("count",), scale=0.5)], ROWS
    )
    assert table.cells == [
        ["base", "1.00 [0.50, 1.50]", "", "1,234", "617.0"],
        ["mine", "2.00", "+50.0% [-25.0%, +75.0%]", "5", "2.5"],
    ]
    assert table.only("count", "no such", "arm").headings == ["count", "arm"]
    bare = Table("t", "", [Column("NLL", ("nll", "all"), "{:.2f}", bare=True)], ROWS)
    assert bare.cells == [["1.00"], ["2.00"]]
    assert bare.values() == [{"NLL": 1.0}, {"NLL": 2.0}]
    parts = Table("t", "", [Column("change, points", ("change", "all"), "{:+.1f}", 100)], ROWS).values()
    assert parts[1] == {"change, points": 50.0, "change, points, low": -25.0, "change, points, high": 75.0}


def test_a_terminal_has_second_lines_or_intervals_below_values():
    table = Table("t", "", [NAME, NLL, CHANGE], ROWS)
    assert [line.split() for line in printed(table)] == [
        ["base", "│", "1.00", "[0.50,", "1.50]"],
        ["mine", "│", "2.00"],
        ["│", "+50.0%", "[-25.0%,", "+75.0%]"],
    ]
    stacked = Table("t", "", [NAME, NLL], ROWS[:1])
    assert [line.split() for line in printed(stacked, stacked=True)] == [
        ["base", "│", "1.00"],
        ["│", "[0.50,", "1.50]"],
    ]
    text = Table.of_texts("t", "", ["", "a"], [["[bold]x [y]", ""]])
    assert printed(text, stacked=True) == ["[bold]x [y] │ -"]


def test_latex_has_words_on_the_left():
    table = Table("t", "a\ncaption", [NAME, NLL], ROWS[:1])
    assert latex(table).splitlines()[:4] == [
        "% a caption",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"arm & NLL \\",
    ]


def test_rows_of_a_record_and_those_of_a_run_are_one():
    read = json.loads((RECORDS / "defaults" / "gsm8k-arms.json").read_text())["rows"]
    names = ("nll", "change")
    made = [
        Row(**row | {name: {k: Estimate(**e) for k, e in row[name].items()} for name in names if row[name]})
        for row in read
    ]
    assert likelihoods(made, "moe-bias").cells == likelihoods(read, "moe-bias").cells
    assert likelihoods(made, "moe-bias").values() == likelihoods(read, "moe-bias").values()


def test_arms_are_compared_in_one_order_however_the_record_is_sorted():
    rows = json.loads((RECORDS / "compare" / "products" / "table.json").read_text())["rows"]
    assert solved(rows).headings[-3:] == ["to base, points", "to static, points", "to lora, points"]
