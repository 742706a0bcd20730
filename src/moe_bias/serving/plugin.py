"""What vLLM calls in each of its processes before it starts: the plugin `moe_bias`.

Logits processors are told neither the engine nor the model they work for, so two places of vLLM are
followed: where requests come in, to check them against the adapters that are served, and where a model
has been loaded, to follow its head and read its output embedding. Without MOE_BIAS_ADAPTERS both are as they were.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.engine.input_processor import InputProcessor

from moe_bias.backbone import HeadTransform
from moe_bias.mistakes import UserError
from moe_bias.serving.embedding import ServedEmbedding, keep_embedding
from moe_bias.serving.following import follow_requests
from moe_bias.serving.head import find_served_head, follow
from moe_bias.serving.keeping import Pass, follow_passes
from moe_bias.serving.notes import kept_states, note_sample, share_kept_states, share_notes
from moe_bias.serving.processor import MoEBiasLogitsProcessor, processor_of
from moe_bias.serving.recording import RowLayout
from moe_bias.serving.requests import Gate, gate_of
from moe_bias.variables import LEARNING, ServingVariables, from_variables


def register() -> None:
    """Makes vLLM apply MoE-Bias adapters; a second call changes nothing."""
    if _is_on():
        share_notes()
    if not hasattr(InputProcessor.__init__, "__wrapped__"):
        InputProcessor.__init__ = _with_gate(InputProcessor.__init__)
        BaseModelLoader.load_model = _with_head_followed(BaseModelLoader.load_model)


def _is_on() -> bool:
    return from_variables(ServingVariables).adapters is not None


def _with_gate(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: InputProcessor, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if _is_on():
            share_notes()  # before the engine's processes are started
            follow_requests()
            if LEARNING in os.environ:
                share_kept_states()
        gate = gate_of(vllm_config)
        original(self, vllm_config, *args, **kwargs)
        if gate is not None:
            self.validate_logits_processors_params = _admitting(gate, self.validate_logits_processors_params)

    return init


def _admitting(gate: Gate, then: Callable[[SamplingParams], None]) -> Callable[[SamplingParams], None]:
    def validate(params: SamplingParams) -> None:
        try:
            gate.admit(params)
        except UserError as error:
            raise VLLMValidationError(str(error)) from error
        then(params)

    return validate


def _with_head_followed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(
        self: BaseModelLoader, vllm_config: VllmConfig, model_config: ModelConfig, *args: Any, **kwargs: Any
    ) -> Any:
        model = original(self, vllm_config, model_config, *args, **kwargs)
        if _is_on() and model_config.runner_type != "pooling" and not _is_draft(vllm_config, model_config):
            head = find_served_head(model, model_config)
            keep_embedding(vllm_config, head.embedding)
            if head.embedding.sample is not None:
                note_sample(model_config, head.embedding.sample)
            processor = _ProcessorOf(vllm_config, head.embedding)
            follow(head.layer, processor)
            if kept_states(RowLayout.of_model(model_config.get_hidden_size(), model_config.dtype)) is not None:
                follow_passes(model, processor)
        return model

    return load_model


def _is_draft(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether a model is there to propose tokens alone: those of EAGLE are loaded under the target's own config."""
    speculation = vllm_config.speculative_config
    return speculation is not None and model_config is not speculation.target_model_config


class _ProcessorOf:
    """Hands on to an engine's processor, which the second runner makes after it has loaded the model.

    It lives as long as the model, and so holds what is kept for the processor.
    """

    def __init__(self, config: VllmConfig, embedding: ServedEmbedding) -> None:
        self._config, self._embedding = config, embedding

    def on_head(self, hidden_BD: Tensor, logits_BV: Tensor, transform: HeadTransform) -> None:
        """See `HeadReader`."""
        processor = self._processor
        if processor is not None:
            processor.on_head(hidden_BD, logits_BV, transform)

    @property
    def wants_passes(self) -> bool:
        """See `PassReader`."""
        processor = self._processor
        return processor is not None and processor.wants_passes

    def on_pass(self, seen: Pass) -> None:
        """See `PassReader`."""
        processor = self._processor
        assert processor is not None
        processor.on_pass(seen)

    @property
    def _processor(self) -> MoEBiasLogitsProcessor | None:
        return processor_of(self._config)
