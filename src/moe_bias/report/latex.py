"""Tables as LaTeX: a tabular of the booktabs package each, for a paper to take in."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bias.report.table import Table

_SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def latex(table: Table) -> str:
    """The file's text; the caption is a comment in it."""
    columns = "".join("l" if column.words else "r" for column in table.columns)
    lines = [
        f"% {' '.join(table.caption.split())}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row(table.headings),
        r"\midrule",
        *(_row(row) for row in table.cells),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    """A line end within `[` would be read as an option of the one before it, so brackets stand in a group."""
    return " & ".join(f"{{{escaped(cell)}}}" if cell.startswith("[") else escaped(cell) for cell in cells) + r" \\"


def escaped(text: str) -> str:
    """The text on one line, without a meaning in LaTeX."""
    return " ".join(text.translate(_SPECIAL).split())
