"""Fixtures that several rooms share, and no network."""

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from helpers.saved import save_adapter, save_model

settings.register_profile("ci", derandomize=True)
"""A change is judged by its own examples; new ones are drawn where someone can look at them."""
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, Debian's package; a test that asks for it is marked `browser`."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that no settings file of the user's counts."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> str:
    return save_model(folder / "model")


@pytest.fixture
def adapter(folder: Path, model: str) -> str:
    return save_adapter(folder / "adapter", model)


@pytest.fixture
def prepared_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a tiny model, a file of rows, and a cache of its own."""
    monkeypatch.setenv("MOE_BIAS_CACHE", str(folder / "cache"))
    save_model(folder / "model")
    rows = [{"question": f"w{5 + n} w6", "answer": f"w{9 + n % 3} w{20 + n % 5} w{9 + n % 3}"} for n in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def shared_grader() -> Iterator[Any]:
    from moe_bias.tasks.grader import Grader

    grader = Grader(workers=1)
    yield grader
    grader.close()


@pytest.fixture
def grader(shared_grader: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One grading process for all tests of a file, as starting one takes a second."""
    from moe_bias.tasks import mathematics

    monkeypatch.setattr(mathematics, "Grader", lambda: shared_grader)
    return shared_grader


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of every kind, all of one model."""
    from helpers.reports import write_runs

    return write_runs(tmp_path_factory.mktemp("runs"))
