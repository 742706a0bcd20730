"""Measuring what layers do on problems that a program can check."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from moe_bias.api.arguments import config_of, named, refuse_other_base, refuse_other_layer
from moe_bias.api.reports import Evaluation
from moe_bias.cluster.answers import answer_pool
from moe_bias.cluster.model import model_of_workers
from moe_bias.config import Cluster, EvalConfig
from moe_bias.evaluation.answering import Asker
from moe_bias.evaluation.ledger import Ledger
from moe_bias.evaluation.samples import INSTRUCTED, SampleFile
from moe_bias.evaluation.scores import scores
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.records import temporary_folder
from moe_bias.tasks.benchmarks import drawn_from, problem_set, protocol_of
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.task import Task
from moe_bias.training.problems import policy_of, saved_layer

Policies = Mapping[str, MoEBiasLayer | str | Path | None]
"""By name a layer, the folder or Hub id of an adapter, or None for the frozen model itself."""


def evaluate(
    base: Frozen,
    policies: Policies,
    task: Task | str | None = None,
    config: EvalConfig | None = None,
    *,
    cluster: Cluster | None = None,
) -> Evaluation:
    """Has policies answer the same problems in one batch, on one backbone, and compares them in pairs.

    The problems are of a task, an object or a name (those that training with the same seed takes are left out), or
    of what the config names: a `benchmark`, or `data` of questions and gold answers. How they are answered is the
    config's: greedy for tasks where it says nothing, else `samples` of each problem at a `temperature`. With the
    config's `instruction` the frozen model is a policy once more, 'instructed', which has that below each prompt.
    The workers of a `cluster` answer in this process's place; they load the model by its name.

    Raises UserError on problems, adapters and settings that cannot be used.
    """
    refuse_other_base(base)
    if not isinstance(policies, Mapping):
        raise UserError(f"`policies` is {named(policies)}; give layers by name, as in {{'base': None, 'mine': layer}}")
    for name, given in policies.items():
        if not isinstance(given, str | Path | None):
            refuse_other_layer(given, base, f"policies[{name!r}]")
    config = _named(config_of(config, EvalConfig), task)
    problems = problem_set(config) if task is None or isinstance(task, str) else drawn_from(make_task(task, {}), config)
    protocol = protocol_of(config)
    if not policies:
        raise UserError("`policies` is empty; give a layer by name, such as {'base': None, 'mine': layer}")
    layers = {name: _layer(base, given) for name, given in policies.items()}
    told = _by_instruction(layers, config.instruction)
    model = model_of_workers(cluster, base)
    names = [name for answering in told.values() for name in answering]
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("eval"))
        ledger = Ledger(problems, names, SampleFile(folder, protocol.samples))
        askers = [
            Asker.of(protocol, base.model, base.tokenizer, ledger, config.batch_size, instruction)
            for instruction in told
        ]
        for asker in askers:
            asker.check_context(base.model)
        numbers = range(len(problems.problems))
        if cluster is not None and model is not None:
            everyone = {name: layer for answering in told.values() for name, layer in answering.items()}
            workers = stack.enter_context(answer_pool(cluster, model, everyone))
            for asker, answering in zip(askers, told.values(), strict=True):
                workers.ask(asker, list(answering), numbers)
        else:
            for asker, answering in zip(askers, told.values(), strict=True):
                policies_of = {name: policy_of(layer, base.head) for name, layer in answering.items()}
                asker.ask(base.model, base.head, policies_of, numbers)
        samples = list(ledger.file.read())
    found = scores(samples, names, {}, problems.ids)
    asked = {name: protocol.prompt(problem) for name, problem in zip(problems.ids, problems.problems, strict=True)}
    return Evaluation(problems.name, len(problems.problems), found, samples, asked, protocol.chat, config.instruction)


def _by_instruction(
    layers: Mapping[str, MoEBiasLayer | None], instruction: str
) -> dict[str, dict[str, MoEBiasLayer | None]]:
    """What answers by name, by what stands below its prompts."""
    told = {"": dict(layers)}
    if instruction:
        if INSTRUCTED in layers:
            raise UserError(f"`policies` names {INSTRUCTED!r}, which is the one with the `instruction`; rename it")
        told[instruction] = {INSTRUCTED: None}
    return told


def _named(config: EvalConfig, task: Task | str | None) -> EvalConfig:
    named = config.benchmark or config.data or config.task
    if task is None and not named:
        raise UserError("give a `task`, or a config with a `benchmark`, `data` or a `task`")
    if task is not None and named:
        raise UserError(f"`task` and the config's {named!r} exclude each other; give one")
    return config.model_copy(update={"task": task}) if isinstance(task, str) else config


def _layer(base: Frozen, given: MoEBiasLayer | str | Path | None) -> MoEBiasLayer | None:
    return saved_layer(str(given), base.head).layer if isinstance(given, str | Path) else given
