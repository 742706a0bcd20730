"""Records of tensors that belong together: one row of each for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor


class Columns:
    """Base of dataclasses whose fields are tensors (T, ...) or records of such, or None; `SHARED` ones have no rows.

    It is none itself, which is why types are ignored where its fields are looked through.
    """

    SHARED: ClassVar[frozenset[str]] = frozenset()

    def at(self, index: Tensor | slice) -> Self:
        """The given rows; a slice copies nothing."""
        return self._changed(lambda column: column[index], self.SHARED)

    def to(self, device: torch.device | str) -> Self:
        """All of it on a device; nothing is copied where it is there already."""
        return self._changed(lambda column: column.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor], untouched: frozenset[str] = frozenset()) -> Self:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        for name in columns.keys() - untouched:
            column = columns[name]
            if column is None:
                continue
            columns[name] = column._changed(change, column.SHARED) if isinstance(column, Columns) else change(column)
        return type(self)(**columns)


Record = TypeVar("Record", bound=Columns)


def joined(parts: Sequence[Record]) -> Record:
    """The rows of all parts, one after the other; what is shared is the first part's. At least one part."""
    first = parts[0]

    def column(name: str) -> Tensor | Columns | None:
        of_parts = [getattr(part, name) for part in parts]
        if name in first.SHARED or of_parts[0] is None:
            return cast(Tensor | None, of_parts[0])
        return joined(of_parts) if isinstance(of_parts[0], Columns) else torch.cat(of_parts)

    return type(first)(**{field.name: column(field.name) for field in fields(first)})  # type: ignore[arg-type]
