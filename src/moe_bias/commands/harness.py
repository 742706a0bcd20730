"""`moe-bias lm-eval`: EleutherAI's lm-evaluation-harness, with the method registered.

Its model `hf` takes an adapter as `peft=`, but first resizes the embeddings where they have more rows
than the tokenizer has tokens, as padded vocabularies do; the adapter then no longer fits. The model
`moe-bias` is the same without that, and knows the bundled model by its name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import moe_bias.adapter  # noqa: F401  # registers the method
from moe_bias.extras import need
from moe_bias.frozen import resolve_model


def run(arguments: Sequence[str]) -> None:
    """Runs the harness with these arguments. Raises UserError where it is not installed."""
    need("lm_eval", "the lm-evaluation-harness")
    from lm_eval.__main__ import cli_evaluate

    _register_model()
    before, sys.argv = sys.argv, ["moe-bias lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


@cache
def _register_model() -> None:
    """The harness refuses a second model of the same name."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    @register_model("moe-bias")
    class MoEBiasLM(HFLM):
        """A transformers model, and an adapter on it as it is."""

        _model: Any

        def __init__(self, pretrained: str, **kwargs: Any) -> None:
            super().__init__(resolve_model(pretrained), **kwargs)

        def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
            super()._create_model(*args, **kwargs)
            if peft:
                self._model = PeftModel.from_pretrained(self._model, peft)
