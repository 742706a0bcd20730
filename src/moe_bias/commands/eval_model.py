"""Answers of a transformers model and its adapters for `eval`: which arms answer together, which alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_bias.adapter.saved import MOE_BIAS
from moe_bias.backbone import Head, find_head
from moe_bias.cluster.answers import answer_pool
from moe_bias.cluster.connection import refuse_unusable
from moe_bias.cluster.model import named_model
from moe_bias.commands.eval_arms import EvalArm, adapted, arm_layers, layer_policies
from moe_bias.commands.looking_settings import EvalSettings
from moe_bias.evaluation.answering import Asker
from moe_bias.evaluation.ledger import Ledger
from moe_bias.frozen import Frozen, load_model
from moe_bias.mistakes import UserError
from moe_bias.rollout.policy import base_policy
from moe_bias.tasks.benchmarks import Protocol


def answer_by_model(settings: EvalSettings, protocol: Protocol, arms: Sequence[EvalArm], ledger: Ledger) -> None:
    """Has the arms answer what the ledger lacks.

    Raises UserError on an adapter that does not fit, and where the model's context has no room for the
    token limit, before the first answer.
    """
    missing = ledger.missing()
    left = [arm for arm in arms if arm.name in missing]
    if not left:
        return
    model, tokenizer = load_model(settings)
    head = find_head(model)[1]
    askers = {
        instruction: Asker.of(protocol, model, tokenizer, ledger, settings.batch_size, instruction)
        for instruction in {arm.instruction for arm in left}
    }
    for asker in askers.values():
        asker.check_context(model)
    _check_fit(model, head, left)
    groups = _groups(left, missing)
    if not settings.is_this_process:
        by_name = (settings.model, settings.device, settings.trust_remote_code)
        named = named_model(Frozen(model, tokenizer), *by_name)
        layers = dict(zip([arm.name for arm in left], arm_layers(left, head), strict=True))
        with answer_pool(settings, named, layers) as workers:
            for group in groups:
                names = [arm.name for arm in group]
                workers.ask(askers[group[0].instruction], names, missing[names[0]])
        return
    for group in groups:
        asker = askers[group[0].instruction]
        numbers = missing[group[0].name]
        names = [arm.name for arm in group]
        if group[0].is_layer:
            asker.ask(model, head, dict(zip(names, layer_policies(group, head), strict=True)), numbers)
        else:
            with adapted(model, head, group[0]) as (changed, changed_head):
                asker.ask(changed, changed_head, {names[0]: base_policy}, numbers)


def refuse_unspreadable(settings: EvalSettings, arms: Sequence[EvalArm]) -> None:
    """Raises UserError, before anything is loaded, where workers cannot be had, or cannot answer under an adapter."""
    if settings.is_this_process:
        return
    refuse_unusable(settings)
    for arm in arms:
        if not arm.is_layer:
            raise UserError(
                f"adapter {arm.adapter!r} of type {arm.method} changes the backbone, and `workers` answer under "
                f"{MOE_BIAS} adapters alone; measure it by a command of its own without `workers`, into the same "
                "`output`"
            )


def _check_fit(model: Any, head: Head, arms: Sequence[EvalArm]) -> None:
    """Puts every adapter on once, so that none fails after hours of the others' answers."""
    layer_policies([arm for arm in arms if arm.is_layer], head)
    for arm in arms:
        if not arm.is_layer:
            with adapted(model, head, arm):
                pass


def _groups(arms: Sequence[EvalArm], missing: dict[str, list[int]]) -> list[list[EvalArm]]:
    """The arms that answer together: those on the frozen backbone that lack and are asked the same; any other alone."""
    groups: dict[Any, list[EvalArm]] = {}
    for arm in arms:
        key = (arm.instruction, *missing[arm.name]) if arm.is_layer else arm.name
        groups.setdefault(key, []).append(arm)
    return list(groups.values())
