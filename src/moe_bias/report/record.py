"""Finding what a run left behind: which records a folder or file holds, and of what kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_bias.mistakes import UserError, as_kind, damaged, read_json, reason_of
from moe_bias.records import RecordKind
from moe_bias.report.content import slug
from moe_bias.report.earlier import guessed_kind, with_flips
from moe_bias.training.metrics import FILE as METRICS_FILE
from moe_bias.training.metrics import SAMPLES_FILE

RECORD_FILES = ("record.json", "table.json", "analysis.json")


@dataclass(frozen=True)
class _Settings:
    """What reports ask of a run's settings."""

    model: str | None = None
    endpoint_model: list[str] | None = None


@dataclass(frozen=True)
class _Common:
    """What records of all kinds have."""

    settings: _Settings | None = None
    provenance: dict[str, Any] | None = None


@dataclass(frozen=True)
class Record:
    """A record with the files beside it.

    `metrics` are the lines of training, `samples` those that a run kept, `parts` the records behind a table.
    """

    path: Path
    name: str
    kind: RecordKind
    content: dict[str, Any]
    metrics: Sequence[dict[str, Any]] = ()
    samples: Sequence[dict[str, Any]] = ()
    parts: Sequence[dict[str, Any]] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was told; empty where the record does not say."""
        return self._of("settings")

    @property
    def provenance(self) -> dict[str, Any]:
        """What it was made with; empty where the record does not say."""
        return self._of("provenance")

    @property
    def model(self) -> str | None:
        """The model's name in the settings, or those of a server's; None where the record does not say."""
        served = self.settings.get("endpoint_model")
        return ", ".join(served) if served else self.settings.get("model")

    def _of(self, key: str) -> dict[str, Any]:
        """From the record itself, else from the first one behind it."""
        found: dict[str, Any] = self.content.get(key) or next((part[key] for part in self.parts if key in part), {})
        return found


def of_wrong_values(path: Path, kind: RecordKind, error: Exception) -> UserError:
    """The error to raise over a record whose values are not what its kind of run writes, by what came of them."""
    return damaged(
        f"record {str(path)!r}", f"it does not hold what {kind.value} writes ({type(error).__name__}: {error})"
    )


def read_records(paths: Sequence[Path]) -> list[Record]:
    """The records of all runs, named by their folder or file, with numbers where two names are the same.

    Raises UserError on a path that is no run, a run that is not finished, one that measured nothing, a
    damaged record, and on records of different models.
    """
    records = [record for path in paths for record in _of_path(path)]
    _refuse_mixed(records)
    return _with_own_names(records)


def _of_path(path: Path) -> list[Record]:
    if path.is_file():
        return [_read(path, path.stem)]
    if not path.is_dir():
        raise UserError(f"{str(path)!r} is neither a folder nor a file; name the output folder of a run, or its record")
    files = [path / name for name in RECORD_FILES if (path / name).is_file()]
    if files:
        return [_read(file, path.resolve().name) for file in files]
    if (path / "run.json").is_file():
        raise UserError(f"{str(path)!r} holds a run that is not finished; start it as before, which goes on with it")
    raise UserError(f"{str(path)!r} holds no record of a run: neither {' nor '.join(RECORD_FILES)} is there")


def _read(path: Path, name: str) -> Record:
    content = with_flips(_json(path))
    kind = _kind(path, content)
    _refuse_empty(path, kind, content)
    folder = path.parent
    parts = [_json(file) for file in sorted(folder.glob("arms/*.json"))] if kind is RecordKind.ARMS else []
    metrics = _lines(folder / METRICS_FILE) if kind in (RecordKind.SUPERVISED, RecordKind.POLICY) else []
    samples = _lines(folder / SAMPLES_FILE) if kind is RecordKind.POLICY else []
    return Record(path, name, kind, content, metrics, samples, parts)


def _kind(path: Path, content: dict[str, Any]) -> RecordKind:
    said = content["kind"] if "kind" in content else guessed_kind(content)
    if said in list(RecordKind):
        return RecordKind(said)
    known = ", ".join(kind.value for kind in RecordKind)
    raise UserError(f"{str(path)!r} is no record that a report can be made of; those are the records of {known}")


def _refuse_empty(path: Path, kind: RecordKind, content: dict[str, Any]) -> None:
    measured = {
        RecordKind.POLICY: lambda: content["right"].get("trained"),
        RecordKind.CELLS: lambda: content["rows"],
        RecordKind.ARMS: lambda: content["rows"],
        RecordKind.EVALUATION: lambda: content["problems"]["count"] and content["arms"],
        RecordKind.ANALYSIS: lambda: content["text"]["tokens"] and content["adapters"],
        RecordKind.DEMO: lambda: content["samples"],
        RecordKind.LABELS: lambda: content["rows"],
        RecordKind.DRAFT: lambda: content["rows"],
        RecordKind.INSPECTION: lambda: content["inspection"]["answers"],
    }
    try:
        is_empty = kind in measured and not measured[kind]()
    except (LookupError, TypeError, AttributeError) as error:
        raise of_wrong_values(path, kind, error) from error
    if is_empty:
        raise UserError(f"{str(path)!r} is the record of a run without samples; there is nothing to report")


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path, "record")
    if not isinstance(found, dict):
        raise UserError(f"{str(path)!r} is no record of a run: it holds no JSON object")
    as_kind(_Common, found, f"record {str(path)!r}")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, or none; raises UserError where one cannot be read."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise damaged(f"file {str(path)!r}", reason_of(error)) from error
    return as_kind(list[dict[str, Any]], lines, f"file {str(path)!r}")


def _refuse_mixed(records: Sequence[Record]) -> None:
    named = [record for record in records if record.model is not None]
    for record in named:
        if record.model != named[0].model:
            raise UserError(
                f"{str(record.path)!r} is of model {record.model!r} and {str(named[0].path)!r} of {named[0].model!r}; "
                "make a report of each model"
            )


def _with_own_names(records: Sequence[Record]) -> list[Record]:
    """Told apart as the names of files are: two that would be the same are numbered."""
    names = [slug(record.name, "") for record in records]
    return [
        record if names.count(name) == 1 else replace(record, name=f"{record.name} ({number})")
        for number, (name, record) in enumerate(zip(names, records, strict=True), 1)
    ]
