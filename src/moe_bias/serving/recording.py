"""Record files: what an engine keeps of a request's tokens, in a folder that its client sees too.

A client makes one file for each request, as long as the request's token limit needs, in the folder
that MOE_BIAS_SPOOL names for both; on /dev/shm files are memory. The engine fills row t with what it
computed to draw token t from, once or several times, the last time with what the token was drawn from.
The client reads as many rows as the answer has tokens, and removes the file.

A file has no header: rows of one size follow each other, of the machine's byte order.

    ordinal          float64   t + 1, so that a row that was never written is told from the others
    entropy          float64   of the base distribution at temperature 1, nats
    log_partition    float64   log Z, and the rest scalars R and A (see `support`), of u = z / T
    log_sum_exp      float64
    mean_logit       float64
    policy_entropy   float64   of the policy at temperature T, nats
    hidden           D numbers, float32, or bfloat16 as its 16 bits; left out where the policy's entropy is
                     below the request's `moe_bias_record_above`, so that such rows take no memory

An engine writes to files alone that stand in this folder under a plain name and have exactly the size
that its own model asks for, so that a name that comes over a network reaches nothing else. Nothing is
mapped: a client that cuts or removes a file harms nobody but itself.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_bias.mistakes import UserError

SCALARS = ("ordinal", "entropy", "log_partition", "log_sum_exp", "mean_logit", "policy_entropy")
"""The columns before the hidden state."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which hidden states of a type are kept: bfloat16 as it is, anything else in float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class RowLayout:
    """The rows of a model whose hidden states have `hidden_size` numbers, kept in `dtype`."""

    hidden_size: int
    dtype: torch.dtype

    @classmethod
    def of_model(cls, hidden_size: int, dtype: torch.dtype) -> RowLayout:
        """The rows of a model that computes in `dtype`."""
        return cls(hidden_size, kept_dtype(dtype))

    @property
    def row(self) -> np.dtype[Any]:
        """A row as numpy reads it; its size in bytes is `row.itemsize`."""
        number = np.uint16 if self.dtype == torch.bfloat16 else np.float32
        return np.dtype([("scalars", np.float64, len(SCALARS)), ("hidden", number, self.hidden_size)])

    def packed(self, scalars_BK: Tensor, hidden_BD: Tensor) -> np.ndarray[Any, Any]:
        """Rows (B,) of scalars in the order of `SCALARS` and hidden states; waits for the device."""
        rows_B = np.empty(len(hidden_BD), self.row)
        rows_B["scalars"] = scalars_BK.cpu().numpy()
        hidden_BD = hidden_BD.to("cpu", self.dtype)
        rows_B["hidden"] = (hidden_BD.view(torch.uint16) if self.dtype == torch.bfloat16 else hidden_BD).numpy()
        return rows_B

    def unpacked(self, rows_T: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Scalars (T, K) float64 and hidden states (T, D) of rows."""
        hidden_TD = torch.from_numpy(np.ascontiguousarray(rows_T["hidden"]))
        scalars_TK = torch.from_numpy(np.ascontiguousarray(rows_T["scalars"]))
        return scalars_TK, hidden_TD.view(torch.bfloat16) if self.dtype == torch.bfloat16 else hidden_TD


@dataclass(frozen=True)
class Spool:
    """The folder of record files, and what their rows are like. Both sides make one of their own model."""

    folder: Path
    layout: RowLayout

    def check_room(self, rows: int) -> None:
        """Raises UserError where the folder is none, or its disk has no room for so many rows."""
        if not self.folder.is_dir():
            raise UserError(f"MOE_BIAS_SPOOL is {str(self.folder)!r}, which is not a folder")
        needed, free = rows * self.layout.row.itemsize, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{str(self.folder)!r} has {free:,} bytes free, and the samples could need {needed:,}; name another "
                "folder in MOE_BIAS_SPOOL, or sample fewer or shorter answers at a time"
            )

    def create(self, name: str, rows: int) -> None:
        """Makes a file; its empty rows take no room yet."""
        with (self.folder / name).open("xb") as file:
            file.truncate(rows * self.layout.row.itemsize)

    def read(self, name: str, rows: int) -> tuple[Tensor, Tensor]:
        """Scalars (T, K) and hidden states (T, D) of the first rows. Raises UserError where one was not written."""
        scalars_TK, hidden_TD, there_T = self.written(name, rows)
        missing = rows - int(there_T.sum())
        if missing:
            raise UserError(
                f"the engine kept nothing of {missing} of an answer's {rows} tokens; its log says why, such as a full "
                f"{str(self.folder)!r}"
            )
        return scalars_TK, hidden_TD

    def written(self, name: str, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same of rows that may be empty, and which are not, (T,) bool; fewer rows of a file that was cut."""
        rows_T = np.fromfile(self.folder / name, self.layout.row, rows)
        scalars_TK, hidden_TD = self.layout.unpacked(rows_T)
        return scalars_TK, hidden_TD, scalars_TK[:, 0] == torch.arange(1, len(rows_T) + 1)

    def remove(self, names: Sequence[str]) -> None:
        """Removes files; those that are gone already are none to worry about."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def open(self, name: object, rows: int) -> RecordFile:
        """The engine's side of a file. Raises UserError on whatever is not a client's file for this model."""
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise UserError(f"{name!r} is no plain file name; a record file stands in MOE_BIAS_SPOOL itself")
        try:
            number = os.open(self.folder / name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"the record file {name!r} cannot be opened in MOE_BIAS_SPOOL: {error.strerror}") from error
        file = RecordFile(number, self.layout, rows)
        found, needed = os.fstat(number), rows * self.layout.row.itemsize
        if not stat.S_ISREG(found.st_mode) or found.st_size != needed:
            kept = f"{self.layout.hidden_size} numbers of {str(self.layout.dtype).removeprefix('torch.')}"
            raise UserError(
                f"the record file {name!r} has {found.st_size} bytes; {rows} tokens of this server's model, whose "
                f"hidden states are {kept}, need {needed}"
            )
        return file


class RecordFile:
    """An open file to write `rows` rows to; it is closed when nothing refers to it."""

    def __init__(self, number: int, layout: RowLayout, rows: int) -> None:
        self.layout, self.rows, self._number = layout, rows, number
        weakref.finalize(self, os.close, number)

    def write(self, place: int, row: np.void, with_hidden: bool = True) -> None:
        """Overwrites a row, or its scalars alone. Raises OSError where there is no room."""
        content = row if with_hidden else row["scalars"]
        os.pwrite(self._number, content.tobytes(), place * row.itemsize)
