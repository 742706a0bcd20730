"""`moe-bias train rl`: an adapter by reinforcement learning with verifiable rewards."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict

import numpy as np
from rich.console import Console

from moe_bias.adapter import save_layer
from moe_bias.api.policy import (
    Beginning,
    Ground,
    collector_of,
    fresh_policy_layer,
    greedy_verdicts,
    policy_of,
    prepare_ground,
    rewards_of,
    saved_layer,
)
from moe_bias.commands.sampling_engine import opened_sampler, refuse_unusable_engine
from moe_bias.adapter.saved import refuse_overwriting
from moe_bias.commands.training_settings import TrainRLSettings
from moe_bias.evaluation.statistics import Estimate, mean, wilson
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import Interrupted
from moe_bias.progress import say, text_console
from moe_bias.records import provenance, write_json
from moe_bias.tasks.task import of_bad_golds
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.metrics import FILE, MetricsLog, SampleLog
from moe_bias.training.rl import PolicyPosition, PolicyTrainer, Watching
from moe_bias.training.run_folder import begin, refuse_other_settings
from moe_bias.training.sft import refuse_impossible


def run(settings: TrainRLSettings) -> None:
    """Trains, measures on held-out problems, and saves adapter and record in `settings.output`.

    Raises UserError on settings that cannot be used, where the folder holds an adapter or an unfinished
    run of other settings, and where rewards stay equal; Interrupted on Ctrl-C, saying where the same
    command goes on.
    """
    refuse_overwriting(settings.output)
    refuse_unusable_engine(settings)
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
    try:
        _run(settings, checkpoints)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(f"run the same command again to go on {checkpoints.where()}") from interrupt


def _run(settings: TrainRLSettings, checkpoints: Checkpoints) -> None:
    console = text_console(highlight=False, soft_wrap=True)
    rewards = rewards_of(settings)
    ground = prepare_ground(settings, settings, settings.seed)
    if settings.adapter is None:
        refuse_impossible(settings, ground.head)
    rewards.try_on(ground.train.problems[0])
    questions = json.dumps([problem.question for problem in ground.train.problems])
    data = {"problems": hashlib.sha256(questions.encode()).hexdigest()}
    begin(settings.output, settings.model_dump(mode="json"), data)
    beginning = _beginning(settings, ground)
    started_with = copy.deepcopy(beginning.layer)
    saved = checkpoints.load(PolicyPosition)
    after = saved[1].step if saved else 0
    if after and not (settings.output / FILE).is_file():
        console.print(f"{settings.output / FILE} is gone: lines of the first {after} steps are lost, the run is not")
    if after and settings.endpoint:
        console.print(
            "the run goes on with the same problems and seeds; a server computes other batches than before, so that "
            "samples may differ from those of a run without an interruption"
        )
    log = MetricsLog(settings.output, after)
    samples = SampleLog(settings.output, settings.show_every, after)

    def evaluate(layer: MoEBiasLayer) -> float:
        policies = [policy_of(layer, ground.head)]
        verdicts = greedy_verdicts(ground, ground.test, policies, settings, "held-out problems")[0]
        return float(np.mean([verdict.is_correct for verdict in verdicts]))

    watching = Watching(evaluate, settings.evaluate_every, checkpoints, log, samples)
    try:
        with opened_sampler(settings, ground, beginning.layer) as sampler:
            collector = collector_of(ground, rewards, settings, sampler, settings.record_margin)
            trainer = PolicyTrainer(beginning.layer, ground.head, collector, settings, watching)
            if saved is not None:
                trainer.resume(*saved)
            _announce(console, beginning, ground)
            position = trainer.run()
    finally:
        log.close()
        samples.close()
        if rewards.failures.failures:
            console.print(str(rewards.failures))
    _record(console, settings, ground, started_with, beginning, position)


def _beginning(settings: TrainRLSettings, ground: Ground) -> Beginning:
    if settings.adapter is not None:
        return saved_layer(settings.adapter, ground.head)
    return fresh_policy_layer(ground, settings)


def _announce(console: Console, beginning: Beginning, ground: Ground) -> None:
    layer, parameters = beginning.layer, ground.model.num_parameters()
    trainable = layer.config.num_parameters(layer.hidden_size, layer.vocab_size)
    console.print(
        f"{trainable:,} trainable parameters, {trainable / parameters:.3%} of the model's {parameters:,}; "
        f"{len(ground.train.problems)} problems of {ground.task.name} to train on, {len(ground.test.problems)} held out"
    )


def _record(
    console: Console,
    settings: TrainRLSettings,
    ground: Ground,
    started_with: MoEBiasLayer,
    beginning: Beginning,
    position: PolicyPosition,
) -> None:
    """Measures, prints and writes the record; the adapter comes after it, so that none is without its record."""
    layers = {"base": None, "start": started_with, "trained": beginning.layer}
    policies = [policy_of(layer, ground.head) for layer in layers.values()]
    verdicts = greedy_verdicts(ground, ground.test, policies, settings, "base, start and trained policy")
    columns = zip(layers, verdicts, strict=True)
    right = {name: np.array([verdict.is_correct for verdict in column], float) for name, column in columns}
    accuracy = {name: wilson(int(values.sum()), len(values)) for name, values in right.items()}
    change = mean(right["trained"] - right["start"])
    record = {
        "accuracy": {name: asdict(value) for name, value in accuracy.items()},
        "change": asdict(change),
        "right": {name: values.tolist() for name, values in right.items()},
        "position": asdict(position),
    }
    settings_used = settings.model_dump(mode="json")
    write_json(settings.output / "record.json", {"settings": settings_used, "provenance": provenance(), **record})
    for name, value in accuracy.items():
        console.print(f"held-out accuracy, {name:<8} {_percent(value)}")
    console.print(f"trained less start          {_percent(change)}")
    held_out = zip(ground.test.problems, verdicts[0], strict=True)
    unread = [problem.gold for problem, verdict in held_out if verdict.outcome == "bad gold"]
    if unread:
        say(console, f"{of_bad_golds(unread, len(ground.test.problems))}.")
    console.print(
        f"{position.sampled_tokens:,} tokens sampled; {position.update_seconds / max(position.seconds, 1e-9):.1%} "
        f"of {position.seconds:,.0f} s was updating"
    )
    save_layer(beginning.layer, settings.output, ground.model, beginning.fork_coverage)
    console.print(f"Saved in {settings.output}.")


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"
