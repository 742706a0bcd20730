"""What the demonstration prints: one sentence of result, then the comparison, answers, and what the experts do.

It fits 100 columns, and can be read in 80.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from moe_bias.analysis import any_off_support, expert_views
from moe_bias.backbone import Head
from moe_bias.commands.expert_table import OFF_SUPPORT, moved, readings_table
from moe_bias.commands.training_settings import DemoSettings
from moe_bias.evaluation.statistics import with_interval
from moe_bias.experiments.demonstration import DemoReport, Reinforced
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import text_console
from moe_bias.report.tables import demonstration
from moe_bias.report.terminal import terminal_table

WIDTH_OF_A_FILE = 100
"""Columns where standard output is no terminal, which would give 80."""
SHOWN_ANSWERS = 3
SHOWN_TOKENS = 4
SHOWN_READINGS = 1
"""Of each linear expert, its strongest."""
SHOWN_CHARACTERS = 150
_SHARE = "{:.1%}"


def report_console() -> Console:
    """A console on standard output, wide enough for the tables where it is no terminal."""
    return text_console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def announce(console: Console, settings: DemoSettings, head: Head, model_parameters: int) -> None:
    """Says what will be trained on what, and at which share of the model's parameters."""
    size = settings.support.partition(":")[2]
    support = tuple(range(int(size))) if size else None
    trainable = settings.layer_config(support).num_parameters(head.hidden_size, head.vocab_size)
    console.print(
        f"Model {settings.model}: {model_parameters:,} parameters, frozen. Adapter: {settings.num_experts} "
        f"{settings.experts} experts, top-{settings.top_k}, support {settings.support}: {trainable:,} trainable "
        f"parameters ({trainable / model_parameters:.3%}).\n"
        f"Task: {settings.task}; {settings.warm_problems} worked answers to learn from, then reinforcement learning "
        f"on {settings.train_problems} problems; {settings.test_problems} others to measure on.",
        highlight=False,
    )


def print_report(
    console: Console,
    report: DemoReport,
    layer: MoEBiasLayer,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
) -> None:
    """Prints the result in a sentence, the comparison, answers, what the experts do, and how to use the adapter."""
    console.print(f"\n{result(report)}\n", highlight=False)
    caption = (
        f"{settings.test_problems} held-out problems, greedy answers, at most {settings.max_new_tokens} tokens;\n"
        "in brackets 95% intervals; trained parameters, and\npaired changes against the row above"
    )
    arms = demonstration([asdict(arm) for arm in report.arms], caption)
    console.print(terminal_table(arms, box=box.SIMPLE_HEAD, padding=0))
    console.print(_answers_table(report))
    _print_experts(console, report, layer, tokenizer)
    support = layer.support_or_all()
    console.print(
        f"The support of {len(support):,} tokens holds {report.fork_coverage:.1%} of the base's probability "
        f"mass at held-out forks. Supervised on {report.train_tokens:,} tokens.\n{_said(report.reinforced)}\n"
        f"The run took {report.seconds:.0f} s.\n",
        highlight=False,
    )
    console.print(f"Saved in {settings.output}. To use it:\n", highlight=False, soft_wrap=True)
    console.print(
        f"  from peft import AutoPeftModelForCausalLM; import moe_bias\n"
        f'  model = AutoPeftModelForCausalLM.from_pretrained("{settings.output}")\n\n'
        f'  moe-bias generate --adapter {settings.output} --compare "What is 7 * 8 * 2?"',
        highlight=False,
        soft_wrap=True,
    )


def result(report: DemoReport) -> str:
    """What came of it, in one sentence: accuracy of the base, after supervised and after reinforcement learning."""
    base, supervised, reinforced = report.arms[0], report.arms[-2], report.arms[-1]
    learned = f"and with the adapter {with_interval(supervised.accuracy, _SHARE)} after supervised learning"
    if report.reinforced.steps:
        learned += f" and {with_interval(reinforced.accuracy, _SHARE)} after reinforcement learning"
    else:
        learned += "; there was no time for reinforcement learning"
    return (
        f"Result: of {len(report.samples)} held-out problems the frozen model answers "
        f"{with_interval(base.accuracy, _SHARE)} right, {learned}."
    )


def _said(reinforced: Reinforced) -> str:
    share = reinforced.updating_seconds / max(reinforced.seconds, 1e-9)
    return (
        f"Reinforcement learning made {reinforced.steps} steps with {reinforced.sampled_tokens:,} sampled tokens in "
        f"{reinforced.seconds:.0f} s, of which updating took {share:.1%}."
    )


def _answers_table(report: DemoReport) -> Table:
    table = Table(
        title=f"The answers to the first {SHOWN_ANSWERS} of them",
        title_justify="left",
        box=box.SIMPLE,
        show_header=False,
        padding=(0, 1, 0, 0),
    )
    for sample in report.samples[:SHOWN_ANSWERS]:
        table.add_section()
        table.add_row(Text("problem"), Text(f"{sample.question.strip()} ({sample.gold})", "bold"))
        for arm, text, right in zip(report.arms, sample.answers, sample.correct, strict=True):
            table.add_row(Text(arm.name), _answer(text, right))
    return table


def _answer(text: str, right: bool) -> Text:
    shown = " ".join(text.split())
    shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]} ..."
    return Text.assemble(("right: " if right else "wrong: ", "green" if right else "red"), shown)


def _print_experts(
    console: Console, report: DemoReport, layer: MoEBiasLayer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of the experts that held-out tokens are routed to."""
    table = Table(
        title="What each used expert does (bias in nats before the gate)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("expert", justify="right")
    table.add_column("use", justify="right")
    table.add_column("raises most")
    table.add_column("lowers most")
    views = expert_views(layer, SHOWN_TOKENS, tokenizer.decode, SHOWN_READINGS)
    used = {number: view for number, view in enumerate(views) if report.expert_share[number] > 0}
    for number, view in used.items():
        raised, lowered = (moved(side, "{:+.1f}") for side in (view.raised, view.lowered))
        table.add_row(str(number), f"{report.expert_share[number]:.1%}", raised, lowered)
    console.print(table)
    readings = readings_table(list(used.items()), SHOWN_TOKENS)
    if readings is not None:
        console.print(readings)
    if any_off_support(used.values()):
        console.print(Text(f"Tokens {OFF_SUPPORT}."))
