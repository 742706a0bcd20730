"""Options of a task as its own config has them: by name and type, wherever they were written."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from moe_bias.mistakes import UserError, first_mistake, shown


def fitted(task: str, config: type[Any], given: Mapping[str, Any], apart: Collection[str] = ()) -> dict[str, Any]:
    """The options in the types of the task's config, a dataclass whose fields `apart` are not for users to set.

    A word, as the command line gives it, and a number are read as what the config asks for: 'false' as a truth value,
    '0.5' as a number. What a settings file gives a type already is of the right one, or refused. Raises UserError on
    an option that the task lacks, or whose value is of another type.
    """
    hints = get_type_hints(config)
    known = {field.name: _kind(hints[field.name], field.default) for field in fields(config) if field.name not in apart}
    for name in given:
        if name not in known:
            raise UserError(f"task {task} has no option {name!r}; its options are {', '.join(known)}")
    return {name: _fitted(task, name, known[name], value) for name, value in given.items()}


def _kind(hint: Any, default: object) -> TypeAdapter[Any]:
    """What the config says that an option is, and what its default is: reasoning-gym has an int that is 0.2."""
    kind: TypeAdapter[Any] = TypeAdapter(hint)
    if default is not MISSING:
        try:
            kind.validate_python(default)
        except ValidationError:
            return TypeAdapter(hint | type(default))
    return kind


def _fitted(task: str, name: str, kind: TypeAdapter[Any], value: Any) -> Any:
    try:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return kind.validate_strings(str(value))
        return kind.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reason = first_mistake(error).reason
        raise UserError(f"option {name} of task {task} is {shown(value)}: {reason}") from error
