"""What users bring under a name: tasks, rewards and objectives of their own.

Such a thing is given as the object itself, as `module:name` (a file in the current folder is a module too), or by
a name: of one that is built in, else of one that an installed package has. A package names what it has by entry
points, in its pyproject.toml:

    [project.entry-points."moe_bias.rewards"]
    brevity = "my_package.rewards:brevity"
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from moe_bias.mistakes import UserError


@dataclass(frozen=True)
class Kind:
    """A kind of things: what one is called, and those that have a name already."""

    noun: str
    built_in: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The group of entry points, such as `moe_bias.rewards`."""
        return f"moe_bias.{self.noun}s"


def resolve(kind: Kind, given: Any) -> Any:
    """What `given` stands for: a text is a name, anything else is the thing itself.

    Raises UserError on a name that nothing has, and where what it names cannot be imported.
    """
    if not isinstance(given, str):
        return given
    if ":" in given:
        return _of_module(kind, given)
    if given in kind.built_in:
        return kind.built_in[given]
    if given in installed(kind):
        return _of_package(kind, given)
    raise unknown(kind, given)


def is_brought(kind: Kind, name: str) -> bool:
    """Whether a name is `module:name` or an installed package's."""
    return ":" in name or name in installed(kind)


def installed(kind: Kind) -> dict[str, list[EntryPoint]]:
    """The entry points of installed packages by their names, of which two packages may have the same."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=kind.group):
        found.setdefault(point.name, []).append(point)
    return found


def unknown(kind: Kind, name: str, known: Collection[str] = ()) -> UserError:
    """The error on a name that nothing has; `known` are names besides those of packages and those built in."""
    packages = installed(kind)
    near = nearest(name, {*known, *kind.built_in, *packages})
    looked = f"looked for among {len(packages)} of installed packages (entry points {kind.group!r})"
    built_in = f" and the built-in {', '.join(kind.built_in)}" if kind.built_in else ""
    suggestion = f"did you mean {near!r}? " if near else ""
    return UserError(
        f"there is no {kind.noun} {name!r}, {looked}{built_in}; {suggestion}one of your own is given as module:name"
    )


def nearest(name: str, known: Collection[str]) -> str:
    """The known name that is most like this one, "" where none is like it."""
    return next(iter(get_close_matches(name, sorted(known), n=1)), "")


def label(given: Any) -> str:
    """What the thing is called in sentences and records: the name as it was given, or `module:name` of an object."""
    if isinstance(given, str):
        return given
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}:{named.__qualname__}"


def told(error: BaseException) -> str:
    """What an error of the user's code says, and of what type it is."""
    return f"{type(error).__name__}: {error}"


def _of_module(kind: Kind, given: str) -> Any:
    module_name, _, path = given.partition(":")
    if not (module_name and path):
        raise UserError(f"{given!r} does not name a {kind.noun}; write it as module:name")
    found = _imported(module_name, given)
    for part in path.split("."):
        if not hasattr(found, part):
            near = nearest(part, [name for name in vars(found) if not name.startswith("_")])
            raise UserError(f"{given!r}: {module_name} has no {path}{f'; did you mean {near!r}?' if near else ''}")
        found = getattr(found, part)
    return found


def _imported(module_name: str, given: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # the file may have been written since the folder was last looked through
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # what runs in the user's module may raise anything
        reason = told(error)
        near = nearest(module_name, [path.stem for path in Path.cwd().glob("*.py")])
        hint = f"; did you mean {near!r}?" if isinstance(error, ModuleNotFoundError) and near else ""
        raise UserError(f"{given!r} cannot be imported: {reason}{hint}") from error


def _of_package(kind: Kind, name: str) -> Any:
    points = installed(kind)[name]
    if len({point.value for point in points}) > 1:
        several = ", ".join(f"{point.value!r}" for point in points)
        raise UserError(f"several installed packages have a {kind.noun} {name!r}; give the one you mean, of {several}")
    point = points[0]
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # as above
        package = point.dist.name if point.dist else "an installed package"
        raise UserError(f"{kind.noun} {name!r} of {package} ({point.value}) cannot be had: {told(error)}") from error
