"""What a request may ask for, checked where it comes in.

`SamplingParams.extra_args` (over HTTP `vllm_xargs`) has the adapter's name in `moe_bias`, and perhaps a
strength in `moe_bias_strength`. The check puts the folder of the adapter's version beside them, which
is what a worker goes by: it runs in another process, and perhaps much later.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm import SamplingParams
from vllm.config import VllmConfig

from moe_bias.config import ServingSettings, UserError
from moe_bias.serving.versions import AdapterFolder

NAME, STRENGTH, VERSION = "moe_bias", "moe_bias_strength", "moe_bias_version"


@dataclass(frozen=True)
class Gate:
    """The adapters that requests to one engine may name, and how the engine treats log-probabilities."""

    folder: AdapterFolder
    adapts_logprobs: bool

    def admit(self, params: SamplingParams) -> None:
        """Adds the version to the arguments of a request that names an adapter; leaves others alone.

        Raises UserError, saying what is wrong, on a request that cannot be answered rightly.
        """
        given = {key: value for key, value in (params.extra_args or {}).items() if key.startswith(NAME)}
        if not given:
            return
        for key in given:
            if key not in (NAME, STRENGTH, VERSION):
                raise UserError(f"unknown argument {key!r}; MoE-Bias knows {NAME!r} and {STRENGTH!r}")
        name, strength = given.get(NAME), given.get(STRENGTH, 1.0)
        if not isinstance(name, str):
            raise UserError(f"{NAME!r} must be the name of an adapter, got {name!r}")
        if not isinstance(strength, int | float) or isinstance(strength, bool) or not math.isfinite(strength):
            raise UserError(f"{STRENGTH!r} must be a finite number, got {strength!r}")
        self._check_logprobs(params)
        params.extra_args = {**(params.extra_args or {}), VERSION: str(self.folder.version(name))}

    def _check_logprobs(self, params: SamplingParams) -> None:
        if params.prompt_logprobs is not None:
            raise UserError(
                "prompt_logprobs are those of the plain model in vLLM; ask for them in a request without 'moe_bias'"
            )
        if params.logprobs is not None and not self.adapts_logprobs:
            raise UserError(
                "logprobs would be those of the plain model on this server; start it with "
                "--logprobs-mode processed_logprobs"
            )


def gate_of(config: VllmConfig) -> Gate | None:
    """The gate of an engine, or None where no folder of adapters is set.

    Raises UserError on settings of the engine with which adapters would be dropped or misplaced.
    """
    root = ServingSettings.model_validate({}).adapters
    if root is None or config.model_config.runner_type == "pooling":
        return None
    _check_engine(config)
    model = config.model_config
    folder = AdapterFolder(root, Path(_versions().name), model.get_hidden_size(), model.get_vocab_size())
    # The first runner moves logits where they are made, the second after their log-probabilities are taken.
    adapts_logprobs = not config.use_v2_model_runner or model.logprobs_mode.startswith("processed")
    return Gate(folder, adapts_logprobs)


def _check_engine(config: VllmConfig) -> None:
    refused = {
        "speculative decoding (--speculative-config)": config.speculative_config is not None,
        "LoRA (--enable-lora)": config.lora_config is not None,
        "batch-sharded sampling (--enable-batch-sharded-sampling)": (
            config.parallel_config.enable_batch_sharded_sampling
        ),
    }
    for what, is_on in refused.items():
        if is_on:
            raise UserError(
                f"{what} passes by the point where MoE-Bias moves logits; leave it out, or serve without "
                "MOE_BIAS_ADAPTERS"
            )



@cache
def _versions() -> tempfile.TemporaryDirectory[str]:
    """Where this process keeps versions; the folder goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="moe-bias-")
