"""Every shipped file of settings is one that its command takes."""

from pathlib import Path

import pytest

from moe_bias.config import CompareSettings, TrainRLSettings
from moe_bias.tasks.catalogue import make_task

FOLDER = Path(__file__).parent.parent / "configs"
SETTINGS = {"compare": CompareSettings, "train-rl": TrainRLSettings}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_file_sets_what_it_says(path, monkeypatch):
    monkeypatch.setenv("MOE_BIAS_CONFIG", str(path))
    command = next(name for name in SETTINGS if path.stem.startswith(name))
    settings = SETTINGS[command]()
    assert str(settings.output) == f"runs/out/{path.stem.removeprefix('train-')}"
    assert settings.rho == 0.2
    if not settings.problems:
        options = settings.task_options
        for changes in ({}, getattr(settings, "shifted_options", {})):
            assert len(make_task(settings.task, {**options, **changes}).problems(50, 0)) == 50
