"""A served folder of adapters, and the same adapters on transformers; what vLLM reads when it is imported.

These are tests of vLLM's first model runner, and with the variables that CONTRIBUTING.md gives of its second.
"""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.served import ADAPTERS, write_adapter, write_model


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the model and of its adapters."""
    root = tmp_path_factory.mktemp("served")
    model = write_model(root / "model")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        write_adapter(root / "adapters" / name, model, config, seed)
    return root / "model", root / "adapters"


@pytest.fixture(scope="session")
def reference(served: tuple[Path, Path]) -> Callable[[str | None], Any]:
    """The same adapters on transformers, as PEFT loads them."""
    model, adapters = served

    def load(name: str | None) -> Any:
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return plain if name is None else PeftModel.from_pretrained(plain, adapters / name).eval()

    loaded = {name: load(name) for name in (None, *ADAPTERS)}
    return loaded.__getitem__
