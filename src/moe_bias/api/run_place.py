"""Where a call of the library leaves what it makes: in the folder that was named, or for a while in one of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_bias.adapter.saved import refuse_overwriting
from moe_bias.mistakes import nothing_stays_without
from moe_bias.records import temporary_folder
from moe_bias.training.run_folder import refuse_other_settings


@contextmanager
def folder_of(output: str | Path | None, purpose: str) -> Iterator[Path]:
    """The folder `output`, or a temporary one where none is named, of which an interrupt says that nothing stays."""
    with nothing_stays_without(output):
        if output is not None:
            yield Path(output)
        else:
            with temporary_folder(purpose) as folder:
                yield folder


@contextmanager
def folder_of_adapter(output: str | Path | None, purpose: str, made_with: Mapping[str, Any]) -> Iterator[Path]:
    """The same for a run that ends with an adapter.

    Raises UserError where a named folder holds an adapter, or an unfinished run of other settings.
    """
    with folder_of(output, purpose) as folder:
        if output is not None:
            refuse_overwriting(folder)
            refuse_other_settings(folder, made_with)
        yield folder
