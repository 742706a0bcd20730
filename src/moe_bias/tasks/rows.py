"""Rows of data as they stand in a file or a data set of the Hub, whatever is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_bias.extras import need
from moe_bias.mistakes import UserError, reason_of, shown

_DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")


def read_rows(source: str, split: str, configuration: str | None = None) -> Sequence[Any]:
    """The rows of a file of JSON, one a line or an array, or of a Hub data set's split, whatever stands in them.

    `configuration` names a part of a Hub data set that has several.
    Raises UserError on a source that is missing or empty, and on a file that is not JSON.
    """
    path = Path(source)
    rows = _file_rows(path) if _is_file(path) else _hub_rows(source, split, configuration)
    if not len(rows):
        raise UserError(f"{source} has no rows")
    return rows


def text_of(value: Any, where: str) -> str:
    """A text that can be tokenised. Raises UserError, naming `where` it stands, on anything else."""
    if not isinstance(value, str):
        raise UserError(f"{where} is not text but {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start : error.end]
        raise UserError(f"{where} holds {half!r}, half of a character: {shown(value)}") from error
    return value


def is_missing(value: Any) -> bool:
    """Whether a column says nothing: null, an empty text, or the NaN that tables have in an empty cell."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _is_file(path: Path) -> bool:
    """Raises UserError where the operating system does not take the name."""
    try:
        return path.is_file()
    except OSError as error:
        raise UserError(f"{shown(str(path))} is not a file: {error.strerror}") from error


_TABLES = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet", ".xlsx": "read_excel"}
"""What pandas reads files of these names by."""


def _file_rows(path: Path) -> list[Any]:
    reader = _TABLES.get(path.suffix.lower())
    if reader is not None:
        raise UserError(
            f"{path} is a table; give pandas.{reader}({str(path)!r}) as the rows, or write it as JSON Lines, by "
            "frame.to_json('rows.jsonl', orient='records', lines=True)"
        )
    try:
        if path.stat().st_size == 0:  # as those of /proc are, some without an end
            return []
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    array = _array(text)
    return _lines(text, path) if array is None else array


def _array(text: str) -> list[Any] | None:
    """The rows of a file that is one array of them, None where it is not."""
    if not text.lstrip().startswith("["):
        return None
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return rows if isinstance(rows, list) else None


def _lines(text: str, path: Path) -> list[Any]:
    rows = []
    # Not `splitlines`, which also breaks a line at U+2028 and others that may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except RecursionError as error:
                raise UserError(f"line {number} of {path} is nested too deeply to be read") from error
            except ValueError as error:  # JSONDecodeError, and numbers of thousands of digits
                raise UserError(
                    f"line {number} of {path} is not JSON: {error}; write one row a line, or an array of rows"
                ) from error
    return rows


def _hub_rows(name: str, split: str, configuration: str | None) -> Sequence[Any]:
    if name.endswith((".jsonl", ".json")):
        raise UserError(f"{name} is not a file")
    _check_folder(Path(name))
    need("datasets", f"reading {shown(name)}, which is no file of JSON,")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows: Sequence[Any] = load_dataset(name, configuration, split=split)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, DatasetsError) as error:
        if Path(name).is_dir():
            raise UserError(
                f"{shown(name)} is a folder whose files cannot be read as rows: {reason_of(error)}"
            ) from error
        raise UserError(
            f"{shown(name)} is neither a file nor a data set that the Hub delivered ({reason_of(error)})"
        ) from error
    return rows


def _check_folder(path: Path) -> None:
    """Raises UserError on a folder without data: what is asked to look for some walks through all that is below it."""
    if not path.is_dir():
        return
    if not path.resolve().name:
        raise UserError(
            f"{shown(str(path))} is the root of all folders; give a JSON Lines file, a folder of data, or the name "
            "of a data set of the Hub"
        )
    try:
        files = [file for folder in (path, path / "data") if folder.is_dir() for file in folder.iterdir()]
    except OSError as error:
        raise UserError(f"{shown(str(path))} cannot be read: {error.strerror}") from error
    if not any(file.suffix in _DATA_FILES for file in files):
        raise UserError(
            f"{shown(str(path))} is a folder without data files in it; give a JSON Lines file, or the name of a data "
            "set of the Hub"
        )
