"""The supervised phase before reinforcement learning: the form of an answer, learned from worked ones."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bias.config import SFTConfig, StartOptions, WarmConfig
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.tasks.conversations import Example, ask, encode
from moe_bias.tasks.task import Problem
from moe_bias.training.problems import TaskData
from moe_bias.training.sft import Prepared, fit, fresh_layer, prepare

MAX_LENGTH = 1024
"""Longer worked answers are cut here, in tokens with the prompt."""


def worked_examples(ground: TaskData, problems: Sequence[Problem]) -> list[Example]:
    """The worked answers as token ids. Raises UserError where a problem has none."""
    if not all(problem.worked for problem in problems):
        raise UserError(f"{ground.task.name} has problems without worked answers, which the supervised phase needs")
    encoded = [encode(ask(problem.question, problem.worked), ground.tokenizer, MAX_LENGTH) for problem in problems]
    return [example for example in encoded if example is not None]


def prepare_warm_start(ground: TaskData, settings: WarmConfig) -> Prepared:
    """Runs the backbone once over the worked answers of the first `warm_problems` and of all held-out problems.

    The support is chosen on the former. Raises UserError where a problem has no worked answer.
    """
    return prepare(
        ground.model,
        ground.head,
        worked_examples(ground, ground.train.problems[: settings.warm_problems]),
        worked_examples(ground, ground.test.problems),
        warm_settings(settings),
        always=ground.stop_ids,
        batch_size=settings.batch_size,
    )


def warm_layer(ground: TaskData, prepared: Prepared, settings: WarmConfig, description: str) -> MoEBiasLayer:
    """A layer of these settings after its supervised phase."""
    training = warm_settings(settings)
    layer = fresh_layer(training, prepared.support, ground.head).to(ground.head.device)
    fit(layer, prepared.train, ground.head, training, description)
    return layer


def warm_settings(settings: WarmConfig) -> SFTConfig:
    """The supervised phase; nothing of it comes from variables or files, whose names mean what follows it."""
    shared = {name: getattr(settings, name) for name in StartOptions.model_fields}
    return SFTConfig.model_construct(
        **shared,
        epochs=settings.warm_epochs,
        expert_rate=settings.warm_expert_rate or settings.WARM_EXPERT_RATES[settings.experts],
        router_rate=settings.warm_router_rate,
    )
