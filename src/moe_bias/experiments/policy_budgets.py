"""What each arm by rewards holds and does, by arithmetic: memory of one training, and tokens of all seeds.

Answers are taken to be as long as they may become. What arms share is counted once: the frozen model's pass over the
worked answers, for all layers, and LoRA's supervised phase, for each seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from moe_bias.config import CompareConfig
from moe_bias.experiments.grid import with_changes
from moe_bias.experiments.policy_arms import BASE, LAYER_ARMS, LORA_ARMS, LORA_SUPERVISED, SUPERVISED
from moe_bias.experiments.warm_start import warm_settings
from moe_bias.mistakes import UserError
from moe_bias.rollout.cache import ROOM
from moe_bias.training.budget import (
    FEATURE_BYTES,
    FLOAT32_BYTES,
    Held,
    LoRABudget,
    ModelSize,
    PolicyBudget,
    Text,
    beyond_memory,
    layer_of,
)
from moe_bias.training.problems import CALIBRATION_GROUP, CALIBRATION_PROMPTS, TaskData

WORKED, LORA_START = "worked answers", "lora's start"
"""Work that arms share."""


@dataclass(frozen=True)
class Grounds:
    """Of a comparison's problems: how many there are, and how long.

    `test` problems are in each of `sets`; `worked` answers are those of all problems to train on, `warm` those of the
    supervised phase, `held_out` those of the problems to measure on, `worked_tokens` the longest with its prompt.
    """

    train: int
    test: int
    sets: int
    prompt_tokens: int
    worked: Text
    warm: Text
    held_out: Text
    worked_tokens: int


@dataclass(frozen=True)
class Work:
    """What is done at most: samples, and tokens.

    `sampled` are tokens of answers to learn from and `measured` of greedy ones; `forward` go through the frozen model
    once, `trained` through the training of a layer on hidden states, `updated` forward and back through the model
    under LoRA, prompts counted.
    """

    samples: int = 0
    sampled: int = 0
    measured: int = 0
    forward: int = 0
    trained: int = 0
    updated: int = 0

    def times(self, count: int) -> Work:
        """So often."""
        return Work(*(count * getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def evaluated_steps(settings: CompareConfig) -> list[int]:
    """The counts of steps after which an arm is measured: none, every `evaluate_every`, all."""
    return [*range(0, settings.steps, settings.evaluate_every), settings.steps]


def layer_budget(
    name: str, size: ModelSize, settings: CompareConfig, prompt_tokens: int, train: int, test: int
) -> PolicyBudget:
    """Of an arm that trains a layer, a step of which has no more problems than there are to train on."""
    changed = with_changes(settings, LAYER_ARMS[name])
    return PolicyBudget(
        size=size,
        settings=changed.model_copy(update={"prompts": min(settings.prompts, train)}),
        layer=layer_of(changed, size.vocab_size),
        prompt_tokens=prompt_tokens,
        test_problems=test,
        evaluate_every=0,
        is_fresh=not settings.warm_problems,
        policies=len(evaluated_steps(settings)),
    )


def refuse_large_steps(ground: TaskData, settings: CompareConfig, names: Sequence[str]) -> None:
    """Raises UserError where a step whose answers reach their limit would not fit, before hours lead to it."""
    size, prompt_tokens = ModelSize.loaded(ground.base.model, ground.head.dtype), max(map(len, ground.train.prompts))
    train, test = len(ground.train.prompts), len(ground.test.prompts)
    for name in names:
        refusal = None
        if name in LAYER_ARMS and name != SUPERVISED:
            refusal = layer_refusal(layer_budget(name, size, settings, prompt_tokens, train, test))
        elif name in LORA_ARMS:
            budget = LoRABudget(size, settings, prompt_tokens, 0, test, name != LORA_SUPERVISED)
            beyond = beyond_memory(list(budget.held()), ground.head.device)
            refusal = beyond and lora_refusal(name, beyond)
        if refusal is not None:
            raise UserError(refusal)


def layer_refusal(budget: PolicyBudget) -> str | None:
    """What the run refuses of an arm's step, and the way out; or None."""
    refusal = budget.refusal()
    return refusal and f"{refusal}; raise it, or lower `prompts`, `group` or `max_new_tokens`"


def lora_refusal(name: str, beyond: str) -> str:
    """The sentence on an arm that no memory holds, and the way out."""
    return (
        f"{name} would hold {beyond}: lower `lora_batch_size`, `max_new_tokens`, `prompts` or `group`, "
        "or leave it out of `arms`"
    )


def layer_held(budget: PolicyBudget, grounds: Grounds, by_rewards: bool) -> Iterator[Held]:
    """All that an arm with a layer holds, one thing after the other."""
    size, settings = budget.size, budget.settings
    assert isinstance(settings, CompareConfig)
    taught = ("sampling", "updating")
    yield from (one for one in budget.held() if by_rewards or one.phase not in taught)
    if not settings.warm_problems:
        return
    tokens = grounds.warm.tokens + grounds.held_out.tokens + (0 if by_rewards else grounds.worked.tokens)
    width = FLOAT32_BYTES * size.hidden_size + FEATURE_BYTES
    yield Held("hidden states of worked answers", tokens * width, "host")
    logits = FLOAT32_BYTES * grounds.warm.tokens * budget.layer.support_size(size.vocab_size)
    kept = logits <= warm_settings(settings).logits_budget
    yield Held("their base logits, to train on", logits if kept else 0, phase="supervised")


def base_held(size: ModelSize, settings: CompareConfig, grounds: Grounds) -> Iterator[Held]:
    """All that the frozen model holds while it is measured."""
    rows = min(settings.batch_size, grounds.test)
    yield Held("weights", size.weights)
    cache = size.cache(rows, grounds.prompt_tokens + settings.max_new_tokens + ROOM)
    yield Held(f"key-value cache of {rows:,} answers, measuring", cache, phase="measuring")


def work_of(name: str, settings: CompareConfig, grounds: Grounds) -> Work:
    """Of one training of an arm and its answers, without what it shares with others."""
    answers = grounds.sets * grounds.test * settings.max_new_tokens
    times = len(evaluated_steps(settings))
    if name == BASE:
        return Work(measured=answers)
    in_steps = settings.steps * min(settings.prompts, grounds.train)
    learned = grounds.worked.share(in_steps / grounds.train)
    if name == LORA_SUPERVISED:
        return Work(measured=(times - 1) * answers, updated=settings.lora_warm_epochs * learned.through)
    if name in LORA_ARMS:
        samples = settings.steps * settings.prompts * settings.group
        updated = samples * (grounds.prompt_tokens + settings.max_new_tokens)
        return Work(samples, samples * settings.max_new_tokens, (times - 1) * answers, updated=updated)
    changed = with_changes(settings, LAYER_ARMS[name])
    warm = changed.warm_epochs * grounds.warm.tokens
    if name == SUPERVISED:
        return Work(measured=times * answers, trained=warm + settings.epochs * learned.tokens)
    drawn = min(settings.prompts * (settings.resamples + 1), grounds.train)
    samples = settings.steps * drawn * settings.group
    selected = round(changed.rho * in_steps * settings.group * settings.max_new_tokens)
    if changed.first_token_only:
        selected = in_steps * settings.group
    calibration = 0 if settings.warm_problems else min(CALIBRATION_PROMPTS, grounds.train) * CALIBRATION_GROUP
    sampled = (samples + calibration) * settings.max_new_tokens
    return Work(samples, sampled, times * answers, trained=warm + changed.epochs * selected)


def shared_work(runs: Mapping[str, int], seeds: int, settings: CompareConfig, grounds: Grounds) -> dict[str, Work]:
    """By what it is the work that arms share; `runs` has trainings to come by arm, `seeds` are those of LoRA's arms."""
    found = {}
    if settings.warm_problems and any(runs.get(name) for name in LAYER_ARMS):
        forward = grounds.warm.through + grounds.held_out.through
        forward += grounds.worked.through if runs.get(SUPERVISED) else 0
        found[WORKED] = Work(forward=forward)
    if any(runs.get(name) for name in LORA_ARMS):
        answers = grounds.sets * grounds.test * settings.max_new_tokens
        updated = settings.lora_warm_epochs * grounds.warm.through
        found[LORA_START] = Work(measured=answers, updated=updated).times(seeds)
    return found
