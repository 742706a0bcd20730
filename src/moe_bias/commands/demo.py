"""`moe-bias demo`: an adapter on the bundled model, by `experiments.demonstration`."""

from __future__ import annotations

import time
from dataclasses import asdict

from moe_bias.adapter import save_layer
from moe_bias.commands.demo_report import announce, print_report, report_console
from moe_bias.commands.training_settings import DemoSettings
from moe_bias.experiments.demonstration import demonstrate
from moe_bias.records import RecordKind, provenance, write_json
from moe_bias.training.problems import prepare_task, rewards_of
from moe_bias.training.sft import refuse_impossible


def run(settings: DemoSettings) -> None:
    """Runs the whole demonstration and prints it; saves the adapter and a record in `settings.output`.

    Raises UserError where the task is none, or has no worked answers.
    """
    started = time.perf_counter()
    console = report_console()
    rewards = rewards_of(settings)
    rewards.check_limit(settings.max_new_tokens)
    data = prepare_task(settings, settings, settings.seed)
    refuse_impossible(settings, data.head)
    announce(console, settings, data.head, data.model.num_parameters())
    report, layer = demonstrate(data, settings, rewards, started, settings.minutes)
    save_layer(layer, settings.output, data.model, report.fork_coverage)
    record = {
        "kind": RecordKind.DEMO,
        "settings": settings.model_dump(mode="json"),
        "provenance": provenance(),
        **asdict(report),
    }
    write_json(settings.output / "record.json", record)
    print_report(console, report, layer, data.tokenizer, settings)
