"""Packages that only some uses need: which extra of this package brings them.

`pip install moe-bias` brings what loading, training and applying an adapter needs; the rest comes with
`pip install 'moe-bias[EXTRA]'`.
"""

from __future__ import annotations

from importlib.util import find_spec

from moe_bias.mistakes import UserError

EXTRA_OF = {
    "datasets": "data",
    "gguf": "gguf",
    "pandas": "data",
    "lm_eval": "lm-eval",
    "math_verify": "tasks",
    "matplotlib": "report",
    "openai": "endpoint",
    "prometheus_client": "chat",
    "ray": "ray",
    "reasoning_gym": "tasks",
    "sklearn": "compare",
    "starlette": "chat",
    "trl": "compare",
    "uvicorn": "chat",
    "vllm": "vllm",
}
"""The extra that brings a module."""


def need(module: str, use: str, or_else: str = "") -> None:
    """Raises UserError where the module is missing, with its use, how to have it, and what to do else."""
    found = find_spec(module)
    if found is None or found.origin is None:  # a folder of that name, as `datasets` often is, is not the package
        package = module.replace("_", "-")
        extra = f"pip install 'moe-bias[{EXTRA_OF[module]}]'"
        raise UserError(f"{use} needs {package}, which is not installed: {extra}{or_else}")
