"""The Python that the pages show does run.

The `python` blocks of a page are run in their order, in one namespace, in an empty folder. A block of any language
whose fence has a `title="..."` is written into that folder under this name and not run. A block right after the
comment `<!-- not run: REASON -->` is left out.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"(?P<left_out>^<!-- not run: .+ -->\n+)?"
    r"^(?P<fence>```+)(?P<language>\w*)(?P<words>[^\n]*)\n(?P<code>.*?)^(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r'title="([^"]+)"')


class Block(NamedTuple):
    """A block of code, the line of the page that it begins in, and the file that it is, "" where it is run."""

    code: str
    line: int
    file: str


def blocks(text: str) -> Iterator[Block]:
    """The blocks that are run or written."""
    for found in _BLOCK.finditer(text):
        title = _TITLE.search(found["words"])
        if not found["left_out"] and (title or found["language"] == "python"):
            yield Block(found["code"], text.count("\n", 0, found.start("code")), title[1] if title else "")


SLOW = {"docs/guides/headroom.md", "docs/guides/learning.md", "docs/guides/rl.md"}
"""They train ten probes, make a fresh adapter of samples, and sample for half a minute."""
PAGES = [
    pytest.param(str(path), marks=pytest.mark.slow) if str(path) in SLOW else str(path)
    for path in sorted(page.relative_to(ROOT) for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
    if any(not block.file for block in blocks((ROOT / path).read_text(encoding="utf-8")))
]


def run_page(path: Path) -> dict[str, object]:
    """The namespace that a page's blocks leave, run in the current folder; errors name the page and its line."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.file:
            Path(block.file).write_text(block.code, encoding="utf-8")
        else:
            exec(compile("\n" * block.line + block.code, str(path), "exec"), namespace)
    return namespace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, from which modules are imported; none of them stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, folder):
    assert list(blocks((ROOT / page).read_text(encoding="utf-8")))
    run_page(ROOT / page)


def test_a_failing_block_is_told_by_its_line(folder):
    page = folder / "page.md"
    page.write_text(
        'Text.\n\n```python title="own.py"\nVALUE = 2\n```\n\n```python\nfrom own import VALUE\n\n1 / 0\n```\n'
    )
    with pytest.raises(ZeroDivisionError) as failed:
        run_page(page)
    assert failed.traceback[-1].lineno == 9
    assert str(failed.traceback[-1].path) == str(page)


def test_blocks_of_other_languages_and_those_left_out_are_not_run(folder):
    page = folder / "page.md"
    page.write_text(
        "```bash\nrm x\n```\n\n<!-- not run: it needs a GPU -->\n```python\n1 / 0\n```\n\n"
        '```json title="rows.jsonl"\n{"a": 1}\n```\n\n```python\nfound = open("rows.jsonl").read()\n```\n'
    )
    assert run_page(page)["found"] == '{"a": 1}\n'
