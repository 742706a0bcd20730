"""A table before it is shown: columns say where in a row their values stand, and how these are written.

Rows are those of a record as it was read, or as it will be written: mappings and lists of numbers, texts and estimates.
So one table is shown by a terminal, a page, Markdown and LaTeX alike, and a data frame has its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_bias.evaluation.statistics import Estimate, estimate_of, with_interval

Row = Any
"""A mapping, a sequence, or an object with attributes."""
Place = tuple[str | int, ...]
"""Keys that lead from a row to a value, one within the other."""


@dataclass(frozen=True)
class Column:
    """Where a row has its value, and the form and factor of a number; where it has none the cell is empty.

    `words` stand on the left, numbers on the right. A terminal shows the values of a column `below` another as second
    lines of that one's. Of an estimate a `bare` column shows no interval.
    """

    heading: str
    place: Place
    form: str = "{}"
    scale: float = 1.0
    words: bool = False
    below: str = ""
    bare: bool = False

    def value(self, row: Row) -> Any:
        """What the row has there, None where it has nothing."""
        found: Any = row
        for key in self.place:
            if isinstance(key, int):
                found = found[key]
            else:
                found = found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)
        return estimate_of(found) if isinstance(found, Mapping) else found

    def cell(self, row: Row) -> str:
        """The value as it is written."""
        value = self.value(row)
        if value is None:
            return ""
        if isinstance(value, Estimate):
            if not self.bare:
                return with_interval(value, self.form, self.scale)
            value = value.value
        return self.form.format(value if self.scale == 1 else self.scale * value)


@dataclass(frozen=True)
class Table:
    """Columns of rows. `name` is that of its file; a page shows a `folded` one when asked to."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    folded: bool = False

    @classmethod
    def of_texts(
        cls,
        name: str,
        caption: str,
        headings: Sequence[str],
        rows: Iterable[Sequence[str]],
        words: int = 1,
        folded: bool = False,
    ) -> Table:
        """A table of texts, of which the first `words` columns hold words, the others numbers."""
        columns = [Column(heading, (place,), words=place < words) for place, heading in enumerate(headings)]
        return cls(name, caption, columns, list(rows), folded)

    @property
    def headings(self) -> list[str]:
        """Those of the columns."""
        return [column.heading for column in self.columns]

    @property
    def cells(self) -> list[list[str]]:
        """All values as they are written, by row."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def only(self, *headings: str) -> Table:
        """The table with these of its columns, in this order."""
        named = {column.heading: column for column in self.columns}
        return replace(self, columns=[named[heading] for heading in headings if heading in named])

    def without_empty_columns(self) -> Table:
        """Only the columns that have a value in some row."""
        kept = [column for column in self.columns if any(column.cell(row) for row in self.rows)]
        return replace(self, columns=kept)

    def values(self) -> list[dict[str, Any]]:
        """The rows for a data frame: by heading the value in its unit, of an estimate the ends of its interval too."""
        return [dict(_values(self.columns, row)) for row in self.rows]


def _values(columns: Sequence[Column], row: Row) -> Iterable[tuple[str, Any]]:
    for column in columns:
        value = column.value(row)
        ends = {} if column.bare or not isinstance(value, Estimate) else {"low": value.low, "high": value.high}
        found = value.value if isinstance(value, Estimate) else value
        yield column.heading, found if column.scale == 1 or found is None else column.scale * found
        yield from ((f"{column.heading}, {end}", column.scale * number) for end, number in ends.items())
