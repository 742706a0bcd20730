"""Every shipped file of settings is one that its command takes, and fits the GPU that it names."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from moe_bias.cli import settings_of
from moe_bias.commands.dry_run import policy_budget
from moe_bias.tasks.catalogue import make_task
from moe_bias.training.budget import ModelSize, PolicyBudget, peak

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


GIB = 2**30
GPU_BYTES = {"H100": 80e9, "H200": 141e9}
MARGIN = 8e9
"""Bytes of a GPU for what the arithmetic leaves out: states between layers, and what libraries keep."""
LONGEST_PROMPT = 1024
QWEN3 = {
    "8b": (
        8.19e9,
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    ),
    "14b": (
        14.8e9,
        {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
}
"""Published parameters and sizes."""


def budget_of(name: str, monkeypatch, *more: str) -> PolicyBudget:
    monkeypatch.setenv("MOE_BIAS_CONFIG", str(FOLDER / f"train-rl-qwen3-{name}.toml"))
    sizes = {**QWEN3[name][1], "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    size = ModelSize.of(Qwen3Config(**sizes, tie_word_embeddings=False), torch.bfloat16)
    return policy_budget(settings_of(["train", "rl", *more])[1], size, LONGEST_PROMPT)


@pytest.mark.parametrize(
    ("name", "gpu", "host", "more"),
    [
        ("8b", "H200", 384 * GIB, ""),
        ("8b", "H100", 384 * GIB, "--prompts 32 --batch-size 1 --engine-memory 16GiB"),
        ("14b", "H200", 256 * GIB, ""),
    ],
)
def test_run_fits_the_gpu_that_its_file_names(name, gpu, host, more, monkeypatch):
    budget = budget_of(name, monkeypatch, *more.split())
    assert budget.size.parameters == pytest.approx(QWEN3[name][0], rel=0.01)
    held = list(budget.held())
    assert peak(held, ["device"]) + MARGIN < GPU_BYTES[gpu]
    assert peak(held, ["host"]) < host
    assert budget.refusal() is None


def test_the_paper_s_step_fits_none_of_them(monkeypatch):
    budget = budget_of("8b", monkeypatch, "--prompts", "512")
    assert peak(list(budget.held()), ["device"]) > max(GPU_BYTES.values())
    assert budget.refusal() == "`sample_budget` 192.0 GiB does not hold the 1.3 TiB that a step may record"


@pytest.mark.parametrize("name", QWEN3)
def test_recipe_is_the_paper_s(name, monkeypatch):
    settings = budget_of(name, monkeypatch).settings
    assert (settings.rho, settings.eps_low, settings.eps_high) == (0.2, 0.2, 0.28)
    assert (settings.group, settings.temperature, settings.max_new_tokens, settings.overlong_cache) == (
        16,
        1,
        20480,
        4096,
    )
    assert (settings.kl_weight, settings.entropy_weight) == (0, 0)
    assert settings.resamples > 0
    measured = settings_of(["eval"])[1]
    assert (measured.benchmark, measured.samples, measured.temperature) == ("aime24", 16, 1)
    assert measured.adapter == [str(settings.output)]
