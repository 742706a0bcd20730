"""Options of a task as its own config, or what makes it, has them: by name and type, wherever they were written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from moe_bias.mistakes import UserError, first_mistake, shown
from moe_bias.plugins import nearest

REQUIRED = MISSING
"""The default of an option that has to be given."""
_OF_ANY_NAME = "**"


@dataclass(frozen=True)
class Option:
    """What type an option is of, as it is written and as it is checked, and its default."""

    type_name: str
    kind: TypeAdapter[Any]
    default: object = REQUIRED


def options_of(made_by: Callable[..., Any], apart: Collection[str] = ()) -> dict[str, Option]:
    """The options of what makes a task, a dataclass, another class or a function; `apart` are not for users to set.

    Raises UserError on annotations that cannot be read.
    """
    is_class_with_init = inspect.isclass(made_by) and not is_dataclass(made_by)
    try:
        hints = get_type_hints(made_by.__init__ if is_class_with_init else made_by)
    except (NameError, TypeError) as error:
        raise UserError(f"the types of the options of {made_by!r} cannot be read: {error}") from error
    found = _fields(made_by) if is_dataclass(made_by) else _parameters(made_by)
    return {
        name: _option(hints.get(name, Any if default in (None, REQUIRED) else type(default)), default)
        for name, default in found.items()
        if name not in apart
    }


def fitted(
    task: str, made_by: Callable[..., Any], given: Mapping[str, Any], apart: Collection[str] = ()
) -> dict[str, Any]:
    """The options in the types that `options_of` finds.

    A word, as the command line gives it, and a number are read as what is asked for: 'false' as a truth value, '0.5' as
    a number. What a settings file gives a type already is of the right one, or refused. Raises UserError on an option
    that the task lacks or that has to be given, and on a value of another type.
    """
    known = options_of(made_by, apart)
    for name in given:
        if name not in known and _OF_ANY_NAME not in known:
            near = nearest(name, known)
            its = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"task {task} has no option {name!r}; {its}{f'; did you mean {near!r}?' if near else ''}")
    missing = [name for name in known if known[name].default is REQUIRED and name not in {*given, _OF_ANY_NAME}]
    if missing:
        raise UserError(f"task {task} has to be given {', '.join(missing)} among its options")
    return {name: _fitted(task, name, known.get(name, known.get(_OF_ANY_NAME)), value) for name, value in given.items()}


def _fields(config: Any) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
        if field.init
    }


def _parameters(made_by: Callable[..., Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in inspect.signature(made_by).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found[_OF_ANY_NAME] = REQUIRED
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            found[name] = REQUIRED if parameter.default is parameter.empty else parameter.default
    return found


def _option(hint: Any, default: object) -> Option:
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return Option(name, _kind(hint, default), default)


def _kind(hint: Any, default: object) -> TypeAdapter[Any]:
    """What the config says that an option is, and what its default is: reasoning-gym has an int that is 0.2."""
    try:
        kind: TypeAdapter[Any] = TypeAdapter(hint)
    except PydanticSchemaGenerationError:  # a class of the task's own
        return TypeAdapter(Any)
    if default is not REQUIRED:
        try:
            kind.validate_python(default)
        except ValidationError:
            return TypeAdapter(hint | type(default))
    return kind


def _fitted(task: str, name: str, option: Option | None, value: Any) -> Any:
    assert option is not None
    try:
        if isinstance(value, str | int) and not isinstance(value, bool) and option.type_name != "Any":
            return option.kind.validate_strings(str(value))
        return option.kind.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reason = first_mistake(error).reason
        raise UserError(f"option {name} of task {task} is {shown(value)}: {reason}") from error
    except TypeError:  # a value of Python that JSON does not have
        return value
