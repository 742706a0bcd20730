"""`moe-bias train rl`: an adapter by reinforcement learning with verifiable rewards."""

from __future__ import annotations

from rich.console import Console

from moe_bias.adapter.saved import refuse_overwriting
from moe_bias.api.reports import RLReport
from moe_bias.api.rewarded import Run, Seams, Watch, begin_run
from moe_bias.cluster.connection import refuse_unusable
from moe_bias.cluster.model import model_of_workers
from moe_bias.commands.sampling_engine import opened_sampler, refuse_unusable_engine
from moe_bias.commands.training_settings import TrainRLSettings
from moe_bias.evaluation.statistics import with_interval
from moe_bias.mistakes import Interrupted
from moe_bias.progress import text_console
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.metrics import FILE
from moe_bias.training.objectives import make_objective
from moe_bias.training.problems import Beginning, TaskData, fresh_policy_layer, prepare_task, rewards_of, saved_layer
from moe_bias.training.rl import PolicyPosition
from moe_bias.training.run_folder import refuse_other_settings
from moe_bias.training.sft import refuse_impossible


def run(settings: TrainRLSettings) -> None:
    """Trains, measures on held-out problems, and saves adapter and record in `settings.output`.

    Raises UserError on settings that cannot be used, where the folder holds an adapter or an unfinished
    run of other settings, and where rewards stay equal; Interrupted on Ctrl-C, saying where the same
    command goes on.
    """
    refuse_overwriting(settings.output)
    refuse_unusable_engine(settings)
    refuse_unusable(settings)
    refuse_other_settings(settings.output, settings.model_dump(mode="json"))
    checkpoints = Checkpoints(settings.output, settings.checkpoint_every, settings.keep_checkpoints)
    try:
        _run(settings, checkpoints)
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:
        raise checkpoints.interrupted() from interrupt


def _run(settings: TrainRLSettings, checkpoints: Checkpoints) -> None:
    console = text_console(highlight=False, soft_wrap=True)
    rewards, made_with = rewards_of(settings), settings.model_dump(mode="json")
    rewards.check_limit(settings.max_new_tokens)
    seams = Seams(make_objective(settings.objective))
    data = prepare_task(settings, settings, settings.seed)
    if settings.adapter is None:
        refuse_impossible(settings, data.head)
    rewards.try_on(data.train.problems[0])
    begin_run(settings.output, data, made_with)
    beginning = (
        fresh_policy_layer(data, settings) if settings.adapter is None else saved_layer(settings.adapter, data.head)
    )
    _warn_of_what_is_lost(console, settings, checkpoints)
    watch = Watch(settings.evaluate_every, settings.show_every, settings.checkpoint_every, settings.keep_checkpoints)
    model = model_of_workers(settings, data.base, settings.model, settings.device, settings.trust_remote_code)
    one = Run(
        data,
        rewards,
        settings,
        watch,
        settings.output,
        beginning,
        settings.record_margin,
        console,
        seams,
        settings,
        model,
    )
    with opened_sampler(settings, data, beginning.layer) as sampler:
        _announce(console, beginning, data)
        report, position = one.trained(sampler)
    _print(console, report)
    one.save(report, position, made_with)
    console.print(f"Saved in {settings.output}.")


def _warn_of_what_is_lost(console: Console, settings: TrainRLSettings, checkpoints: Checkpoints) -> None:
    saved = checkpoints.load(PolicyPosition)
    after = saved[1].step if saved else 0
    if after and not (settings.output / FILE).is_file():
        console.print(f"{settings.output / FILE} is gone: lines of the first {after} steps are lost, the run is not")
    if after and settings.endpoint:
        console.print(
            "the run goes on with the same problems and seeds; a server computes other batches than before, so that "
            "samples may differ from those of a run without an interruption"
        )


def _announce(console: Console, beginning: Beginning, data: TaskData) -> None:
    layer, parameters = beginning.layer, data.base.model.num_parameters()
    trainable = layer.config.num_parameters(layer.hidden_size, layer.vocab_size)
    console.print(
        f"{trainable:,} trainable parameters, {trainable / parameters:.3%} of the model's {parameters:,}; "
        f"{len(data.train.problems)} problems of {data.task.name} to train on, {len(data.test.problems)} held out"
    )


def _print(console: Console, report: RLReport) -> None:
    for name, value in report.accuracy.items():
        tokens = with_interval(report.tokens[name], "{:.0f}")
        console.print(f"held-out accuracy, {name:<8} {with_interval(value, '{:.1%}')}, {tokens} tokens")
    change, tokens = with_interval(report.change, "{:.1%}"), with_interval(report.tokens_change, "{:+.0f}")
    console.print(f"trained less start          {change}, {tokens} tokens")
    console.print(
        f"{report.sampled_tokens:,} tokens sampled; {report.update_seconds / max(report.seconds, 1e-9):.1%} "
        f"of {report.seconds:,.0f} s was updating"
    )
