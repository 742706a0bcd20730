"""The tests have the rooms of the package, and share what `helpers` and fixtures hold, nothing of each other."""

import ast
from pathlib import Path

import moe_bias

TESTS = Path(__file__).parent
PACKAGE = Path(moe_bias.__file__).parent
BESIDE = {"helpers", "adapters"}
"""What tests share, and adapters that older versions saved."""


def imported(code: str) -> set[str]:
    """Every part of the names that are imported, at the top or within a function."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names}
            names |= {node.module or ""}
    return {part for name in names for part in name.split(".")}


def of_tests(code: str) -> set[str]:
    return {name for name in imported(code) if name.startswith("test_") or name == "conftest"}


def test_no_test_imports_from_another():
    found = {str(path.relative_to(TESTS)): of_tests(path.read_text(encoding="utf-8")) for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_way_to_import_is_seen():
    code = "import test_a\nfrom test_b import x\n\ndef f():\n    from .conftest import y\n    from a import test_c\n"
    assert of_tests(code) == {"test_a", "test_b", "conftest", "test_c"}


def test_every_room_of_tests_is_one_of_the_package():
    rooms = {path.parent.name for path in TESTS.rglob("test_*.py")} - {TESTS.name}
    assert rooms <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not rooms & BESIDE
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == rooms | BESIDE
