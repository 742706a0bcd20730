"""The pages' templates, styles and scripts, which are files of this package."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Markup", "json_in_html", "rendered"]
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def rendered(name: str, **values: Any) -> str:
    """A template filled in. Text is escaped unless it is Markup; a value that lacks is an error."""
    return _environment().get_template(name).render(**values)


def json_in_html(value: Any) -> str:
    """JSON that stays JSON within a script element, whatever text it holds.

    Letters outside ASCII, U+2028 and lone halves of a surrogate pair among them, are escaped too.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return "".join(_UNSAFE.get(letter, letter) for letter in text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("moe_bias.report", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"style": _own_file, "script": _own_file}
    return environment


def _own_file(name: str) -> Markup:
    """A style or script of the package as it is: our own text, so nothing is escaped."""
    return Markup((files("moe_bias.report") / "pages" / name).read_text(encoding="utf-8"))
