"""Writes docs/commands.md from the command's own help, docs/reference.md from the public names, tables from records.

    python docs/generate.py [--check]

Checking also parses every `moe-bias` command that README and docs show, and looks for the reason of
every dependency in CONTRIBUTING.md, so that none goes stale.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

os.environ["COLUMNS"] = "100"  # argparse wraps at the terminal's width; the page must not depend on it
os.environ["NO_COLOR"] = "1"
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from tables import filled

import draw_curves
import draw_growth
import draw_labels
import moe_bias
from figure_text import svg_text
from moe_bias import _HOMES
from moe_bias.cli import COMMANDS, GROUPS, PROGRAM, build_parser, is_passed_on
from moe_bias.commands.sources import PARTS, key_of, part_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "commands.md"
SHOWN_KEYS = 5
HEADER = """# Commands

Every option can also be set by a variable (`--top-k` is `MOE_BIAS_TOP_K`) or in the TOML file `moe-bias.toml` of the
current folder; `MOE_BIAS_CONFIG` names another file. The command line wins over variables, variables over the file.
A `MOE_BIAS_` variable that no command reads is refused, as a misspelt option is.

The file has sections: one for each part that commands share, and one for each command, named by its last word
(`[sft]`, `[rl]`, `[compare]`), which may hold any of its options and wins. So a name means what its section says:
`expert_rate` in `[sft]` is not that of `[rl]`.

| section | holds | read by |
| --- | --- | --- |
{sections}

```toml
[model]
model = "Qwen/Qwen3-8B"

[layer]
num_experts = 8

[sft]
expert_rate = 3e-3
output = "my-adapter"
```

Exit codes: 0; 2 for a mistake of the user's, told in one sentence; 130 after an interrupt, with what was saved.

This page is the commands' own `--help`; `python docs/generate.py` writes it.
"""
REFERENCE = ROOT / "docs" / "reference.md"
REFERENCE_HEADER = """# Python

The public names, by the module that each is defined in; all of them are had from `moe_bias` itself. Shapes are given by
letters: N or T tokens, D hidden size, M tokens of the support, V vocabulary, E experts.
"""
_FENCED = re.compile(r"^```(?!text)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page() -> str:
    """The whole of docs/commands.md."""
    words = ["", *GROUPS, *(command.words for command in COMMANDS)]
    parts = (f"\n## `{title(entry)}`\n\n```text\n{help_of(entry)}```\n" for entry in words)
    return HEADER.replace("{sections}", sections()) + "".join(parts)


def reference() -> str:
    """The whole of docs/reference.md: mkdocstrings puts the docstrings in when the site is built."""
    return REFERENCE_HEADER + "".join(
        f"\n## `moe_bias.{home}`\n" + "".join(f"\n::: moe_bias.{name}\n{fields_of(name)}" for name in names)
        for home, names in sorted(_HOMES.items())
    )


def fields_of(name: str) -> str:
    """A table of a config's fields with their defaults, in place of its members; "" where the name is no config."""
    fields = getattr(getattr(moe_bias, name), "model_fields", {})
    rows = (
        f"| `{field}` | `{info.get_default(call_default_factory=True)!r}` | {_in_a_cell(info.description or '')} |\n"
        for field, info in fields.items()
    )
    table = "    options: {members: false}\n\n| field | default | |\n| --- | --- | --- |\n"
    return table + "".join(rows) if fields else ""


def _in_a_cell(text: str) -> str:
    """Text as it is in a table's cell: no markup, no column."""
    return re.sub(r"([|*_<\[`])", r"\\\1", text)


def written_pages() -> list[Path]:
    """README and the pages of docs that are written by hand, in which only marked blocks are generated."""
    return [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {PAGE, REFERENCE})]


def sections() -> str:
    """A row for each section that commands share: some of its keys, and the commands."""
    rows = []
    for name in dict.fromkeys(PARTS.values()):
        fields = {
            key_of(field, name): None
            for command in COMMANDS
            for field in command.settings.model_fields
            if part_of(command.settings, field) == name
        }
        readers = [
            f"`{command.words}`"
            for command in COMMANDS
            if any(part_of(command.settings, field) == name for field in command.settings.model_fields)
        ]
        shown = ", ".join(f"`{field}`" for field in list(fields)[:SHOWN_KEYS])
        more = ", ..." if len(fields) > SHOWN_KEYS else ""
        rows.append(f"| `[{name}]` | {shown}{more} | {', '.join(readers)} |")
    return "\n".join(rows)


def title(words: str) -> str:
    """A command as it is typed."""
    return f"{PROGRAM} {words}".strip()


def help_of(words: str) -> str:
    """What `--help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        build_parser().parse_args([*words.split(), "--help"])
    return printed.getvalue()


def shown_commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `moe-bias` command in the fenced blocks of a Markdown page, output left out."""
    for block in _FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            _, found, arguments = line.partition(f"{PROGRAM} ")
            if found and line.lstrip("$ ").startswith((PROGRAM, "uv run", "pip install", "MOE_BIAS_")):
                yield shlex.split(arguments.split("|")[0], comments=True)


def stale_commands() -> Iterator[str]:
    """One sentence for each shown command that does not parse."""
    for path in written_pages():
        for arguments in shown_commands(path.read_text(encoding="utf-8")):
            if not _parses(arguments):
                yield f"{path.relative_to(ROOT)} shows a command that does not parse: {PROGRAM} {shlex.join(arguments)}"


def _parses(arguments: list[str]) -> bool:
    if is_passed_on(arguments):
        return True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            build_parser().parse_args(arguments)
    except SystemExit as stop:
        return stop.code == 0
    return True


def undefended_dependencies() -> Iterator[str]:
    """One sentence for each direct dependency that CONTRIBUTING.md does not say the reason of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    groups = (*project["project"]["optional-dependencies"].values(), *project["dependency-groups"].values())
    for requirement in (*project["project"]["dependencies"], *chain(*groups)):
        name = re.split(r"[^\w.-]", requirement)[0]
        if f"| `{name}`" not in contributing and name != project["project"]["name"]:
            yield f"CONTRIBUTING.md does not say why {name} is a dependency"


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated page and figure, and README and docs with their tables made anew, as path and text."""
    yield PAGE, page()
    yield REFERENCE, reference()
    yield draw_growth.FIGURE, draw_growth.svg(draw_growth.newest())
    for figure_path, figure in chain(draw_curves.figures(), draw_labels.figures()):
        yield figure_path, svg_text(figure)
    for path in written_pages():
        yield path, filled(path.read_text(encoding="utf-8"))


def main() -> int:
    """Writes the pages, or with --check says what is stale; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something is stale")
    if not parser.parse_args().check:
        for path, text in pages():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [*stale_commands(), *undefended_dependencies()]
    for path, text in pages():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(f"{path.relative_to(ROOT)} is not what help and records give; run python docs/generate.py")
    sys.stderr.writelines(f"{sentence}\n" for sentence in stale)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
