"""What a request may ask for, checked where it comes in.

`SamplingParams.extra_args` (over HTTP `vllm_xargs`) has the adapter's name in `moe_bias`, or several with
their strengths, and perhaps a strength in `moe_bias_strength` (see `asked`); a client on the same machine
may name a file in `moe_bias_record`, which what training needs of the answer is written to (see
`recording`), and in `moe_bias_record_above` the entropy in nats below which it needs no hidden states. The
check puts beside them, for each adapter, its name, the folder of its version and its strength, which is what
a worker goes by: it runs in another process, and perhaps much later.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm import SamplingParams
from vllm.config import VllmConfig

from moe_bias.mistakes import UserError
from moe_bias.serving.asked import NAME, STRENGTH, Strengths, asked_adapters, finite
from moe_bias.serving.keeping import KEEP
from moe_bias.serving.notes import kept_states, noted_sample
from moe_bias.serving.recording import RowLayout, Spool
from moe_bias.serving.versions import AdapterFolder
from moe_bias.variables import ServingVariables, from_variables

VERSION, RECORD, RECORD_ABOVE = "moe_bias_version", "moe_bias_record", "moe_bias_record_above"


@dataclass(frozen=True)
class Gate:
    """The adapters that requests to one engine may name, and how the engine treats log-probabilities.

    `spool` is where requests may be recorded, and what hinders that, or hinders a seed beside it, says how to start the
    engine instead. `kept` is where hidden states are kept for learning.
    """

    folder: AdapterFolder
    adapts_logprobs: bool
    spool: Spool | None = None
    kept: Spool | None = None
    hinders_recording: str | None = None
    hinders_seeds: str | None = None

    def admit(self, params: SamplingParams) -> None:
        """Adds the versions to the arguments of a request that names adapters; leaves others alone.

        Raises UserError, saying what is wrong, on a request that cannot be answered rightly.
        """
        given = {key: value for key, value in (params.extra_args or {}).items() if key.startswith(NAME)}
        keep = given.pop(KEEP, None)
        if keep is not None:
            self._check_keep(keep)
        if not given:
            return
        for key in given:
            if key not in (NAME, STRENGTH, VERSION, RECORD, RECORD_ABOVE):
                raise UserError(f"unknown argument {key!r}; MoE-Bias knows {NAME!r}, {STRENGTH!r} and {RECORD!r}")
        asked = asked_adapters(given.get(NAME), given.get(STRENGTH), self.folder.names)
        finite(repr(RECORD_ABOVE), given.get(RECORD_ABOVE, 1.0))
        self._check_logprobs(params)
        if RECORD in given:
            self._check_recording(given[RECORD], asked, params)
        versions = [[name, str(self.folder.version(name)), strength] for name, strength in asked.items()]
        params.extra_args = {**(params.extra_args or {}), VERSION: versions}

    def _check_keep(self, keep: object) -> None:
        """Only this server itself asks for it: nobody else knows the name of a file that is there."""
        match keep:
            case [str(name), int(), int(rows)] if self.kept is not None:
                self.kept.open(name, rows)
            case _:
                raise UserError(f"{KEEP!r} is for the server's own requests; leave it out")

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

    def _check_recording(self, record: object, asked: Strengths, params: SamplingParams) -> None:
        if self.spool is None:
            raise UserError(
                f"{RECORD!r} is refused: this server keeps nothing of requests without MOE_BIAS_SPOOL=FOLDER"
            )
        hindrance = self.hinders_recording or (self.hinders_seeds if params.seed is not None else None)
        if hindrance is not None:
            raise UserError(f"{RECORD!r} is refused: start the server with {hindrance}")
        if len(asked) > 1:
            raise UserError(f"{RECORD!r} is for the training of one adapter, and {NAME!r} names {sorted(asked)}")
        if params.n > 1 or params.temperature == 0:
            raise UserError(f"{RECORD!r} is for one sample at a temperature above 0; ask for each sample by itself")
        self.spool.open(record, params.max_tokens or 0)


def adapters_of(params: SamplingParams | None) -> list[str]:
    """The names of the adapters that an admitted request is answered under."""
    admitted = (params.extra_args or {}).get(VERSION, []) if params is not None else []
    return [name for name, _, _ in admitted]


def gate_of(config: VllmConfig) -> Gate | None:
    """The gate of an engine, or None where no folder of adapters is set.

    Raises UserError on settings of the engine with which adapters would be dropped or misplaced.
    """
    settings = from_variables(ServingVariables)
    root = settings.adapters
    if root is None or config.model_config.runner_type == "pooling":
        return None
    _check_engine(config)
    model = config.model_config
    sizes = model.get_hidden_size(), model.get_vocab_size()
    folder = AdapterFolder(root, Path(_versions().name), *sizes, lambda: noted_sample(model))
    # The first runner moves logits where they are made, the second after their log-probabilities are taken.
    adapts_logprobs = not config.use_v2_model_runner or model.logprobs_mode.startswith("processed")
    layout = RowLayout.of_model(sizes[0], model.dtype)
    spool = None if settings.spool is None else Spool(settings.spool, layout)
    return Gate(folder, adapts_logprobs, spool, kept_states(layout), _hinders_recording(config), _hinders_seeds(config))


def _hinders_recording(config: VllmConfig) -> str | None:
    """How to start an engine that requests cannot be recorded with as it is."""
    if config.model_config.logprobs_mode != "processed_logprobs":
        return "--logprobs-mode processed_logprobs: others are not of the distribution that is sampled"
    return None


def _hinders_seeds(config: VllmConfig) -> str | None:
    """How to start an engine that could end when a request with a seed comes.

    vLLM's first runner rewinds generators of GPUs only; the second has none.
    """
    if config.use_v2_model_runner:
        return None
    if config.device_config.device_type == "cpu" and config.scheduler_config.enable_chunked_prefill:
        return "--no-enable-chunked-prefill: on a CPU vLLM ends when it cuts the prompt of a request with a seed"
    return None


def _check_engine(config: VllmConfig) -> None:
    if config.speculative_config is not None and not config.use_v2_model_runner:
        raise UserError(
            "with speculative decoding (--speculative-config) vLLM's first model runner leaves logits processors out; "
            "set VLLM_USE_V2_MODEL_RUNNER=1, which needs Triton, leave it out, or serve without MOE_BIAS_ADAPTERS"
        )
    refused = {
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
