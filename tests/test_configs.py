"""Every shipped file of settings is one that its command takes."""

from pathlib import Path

import pytest

from moe_bias.cli import settings_of
from moe_bias.tasks.catalogue import make_task

FOLDER = Path(__file__).parent.parent / "configs"
COMMANDS = {"compare": ["compare"], "train-rl": ["train", "rl"]}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_file_sets_what_it_says(path, monkeypatch):
    monkeypatch.setenv("MOE_BIAS_CONFIG", str(path))
    words = next(words for name, words in COMMANDS.items() if path.stem.startswith(name))
    settings = settings_of(words)[1]
    assert str(settings.output) == f"runs/out/{path.stem.removeprefix('train-')}"
    assert settings.rho == 0.2
    if not settings.problems:
        options = settings.task_options
        for changes in ({}, getattr(settings, "shifted_options", {})):
            assert len(make_task(settings.task, {**options, **changes}).problems(50, 0)) == 50
