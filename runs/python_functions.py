"""Writes a text of another kind than mathematics: functions of Python's standard library, as prompts and completions.

A prompt shows a function's first lines up to the end of its docstring, the completion is its body.
Functions stand in a random order drawn with a fixed seed, so that a part of the file is a sample of
the whole. Which functions there are follows from the version of Python that runs this.

    uv run python runs/python_functions.py FILE [--functions 2400]
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LINES = range(3, 40)
"""How long a body is, in lines."""


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--functions", type=int, default=2400)
    options = parser.parse_args()
    rows = list(dict.fromkeys(function for path in sources() for function in functions_of(path)))
    random.Random(0).shuffle(rows)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with options.file.open("w", encoding="utf-8") as file:
        for start, body in rows[: options.functions]:
            prompt = f"Complete this function of Python's standard library.\n\n{start}"
            file.write(json.dumps({"question": prompt, "answer": body}) + "\n")


def sources() -> list[Path]:
    """The library's own modules, without tests and what was installed beside them."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
    return sorted(path for path in folder.rglob("*.py") if not left_out & set(path.relative_to(folder).parts))


def functions_of(path: Path) -> Iterator[tuple[str, str]]:
    """Each documented function of a module: up to the end of its docstring, and its body."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):  # the library holds files that are broken on purpose
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            documented = node.body[0].end_lineno
            assert documented is not None
            body = lines[documented : node.end_lineno]
            if len(body) in LINES:
                yield "\n".join(lines[node.lineno - 1 : documented]), "\n".join(body)


if __name__ == "__main__":
    main()
