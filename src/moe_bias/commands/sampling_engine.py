"""What `train rl` samples with: the frozen model itself, an engine of vLLM in this process, or a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from moe_bias.commands.training_settings import TrainRLSettings
from moe_bias.features.extract import run_backbone
from moe_bias.frozen import resolve_model
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.rollout.engines import EngineChoices, ServerEngine, refuse_without_vllm
from moe_bias.rollout.sampler import Sampler
from moe_bias.rollout.vllm import VllmSampler, local_sampler
from moe_bias.serving.recording import RowLayout, Spool
from moe_bias.tasks.conversations import Example
from moe_bias.training.problems import TaskData, sampler_of, sampling_choices
from moe_bias.variables import ServingVariables, from_variables

TRIAL_TOKENS = 8
FARTHEST = 0.1
"""Hidden states of one model computed twice in bfloat16 are a hundredth of their norm apart."""


def refuse_unusable_engine(settings: TrainRLSettings) -> None:
    """Raises UserError, before anything is loaded, where vLLM or the server cannot be had."""
    if settings.engine == "transformers":
        return
    if not settings.endpoint:
        refuse_without_vllm()
        return
    _shared_folders()
    ServerEngine(settings.endpoint)


@contextmanager
def opened_sampler(settings: TrainRLSettings, ground: TaskData, layer: MoEBiasLayer) -> Iterator[Sampler]:
    """The sampler that the settings ask for, tried with the layer; what it made in folders goes with it."""
    if settings.engine == "transformers":
        yield sampler_of(settings, ground)
        return
    with _server_sampler(settings, ground) if settings.endpoint else _local_sampler(settings, ground) as sampler:
        _refuse_another_model(sampler, settings, ground, layer)
        yield sampler


@contextmanager
def _server_sampler(settings: TrainRLSettings, ground: TaskData) -> Iterator[VllmSampler]:
    adapters, records = _shared_folders()
    spool = Spool(records, RowLayout.of_model(ground.head.hidden_size, ground.head.dtype))
    engine, budget = ServerEngine(settings.endpoint), int(settings.sample_budget)
    sampler = VllmSampler(engine, ground.model, ground.head, adapters, spool, budget)
    try:
        yield sampler
    finally:
        sampler.close()


def _local_sampler(settings: TrainRLSettings, ground: TaskData) -> AbstractContextManager[VllmSampler]:
    longest = max(len(prompt) for prompt in ground.train.prompts) + settings.max_new_tokens
    memory = int(settings.engine_memory)
    choices = EngineChoices(
        resolve_model(settings.model), ground.model.dtype, longest, memory, settings.trust_remote_code
    )
    return local_sampler(ground.model, ground.head, choices, int(settings.sample_budget))


def _shared_folders() -> tuple[Path, Path]:
    """The folders of adapters and of record files. Raises UserError where the variables do not name any."""
    settings = from_variables(ServingVariables)
    found = []
    for name in ("adapters", "spool"):
        folder = getattr(settings, name)
        if folder is None or not folder.is_dir():
            raise UserError(
                f"--endpoint needs MOE_BIAS_{name.upper()} to name the folder that the server was started with, "
                f"not {str(folder or '')!r}"
            )
        found.append(folder)
    return found[0], found[1]


def _refuse_another_model(
    sampler: VllmSampler, settings: TrainRLSettings, ground: TaskData, layer: MoEBiasLayer
) -> None:
    """Samples a few tokens. Raises UserError where their hidden states are not those of the frozen model."""
    choices = sampling_choices(settings, ground)
    trial = replace(choices, group=1, max_new_tokens=min(TRIAL_TOKENS, choices.max_new_tokens))
    features = sampler.sample(ground.train.prompts[:1], layer, trial, settings.seed, "").features
    example = Example(ground.train.prompts[0], features.token.tolist())
    hidden_TD = run_backbone(ground.model, [example], 1, "the engine tried").hidden
    distance = float((features.hidden.float() - hidden_TD).norm() / hidden_TD.norm())
    if distance > FARTHEST:
        raise UserError(
            f"the engine's hidden states are {distance:.0%} away from those of {settings.model!r}: "
            f"{settings.endpoint or 'it'} serves another model, or other weights of it"
        )
