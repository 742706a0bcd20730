"""The tables of `eval`, as they are printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from moe_bias.report.table import Table
from moe_bias.report.tables import by_group, equal_tokens, has_lengths, others_of, passes, percents, scores, writing
from moe_bias.report.terminal import terminal_table


def print_scores(console: Console, record: Mapping[str, Any]) -> None:
    """Prints what each arm scores, how its answers are written, accuracy by level and subject where the problems
    have them, and changes between arms.
    """
    arms = record["arms"]
    console.print(terminal_table(_scores(record), stacked=True))
    console.print(terminal_table(writing(arms)))
    if arms[0]["pass_at"]:
        console.print(terminal_table(passes(arms)))
    if has_lengths(arms):
        console.print(terminal_table(equal_tokens(arms), stacked=True))
    for column in arms[0]["groups"]:
        console.print(terminal_table(by_group(arms, column), stacked=True))
    if len(arms) > 2:
        changes = scores(arms[1:], "Change of accuracy to each arm before, paired by problem")
        shown = changes.only("arm", *(f"to {other}, points" for other in others_of(arms)))
        console.print(terminal_table(shown, stacked=True))


def _scores(record: Mapping[str, Any]) -> Table:
    arms, n = record["arms"], record["protocol"]["samples"]
    unread = [arm["failures"]["unparseable"] + arm["failures"]["timed out"] for arm in arms]
    rows = [arm | {"unread": share} for arm, share in zip(arms, unread, strict=True)]
    table = scores(rows, _caption(record), more=[percents("unread, %", "unread")])
    to_first = f"to {arms[0]['name']}, points"
    bad_golds = ["bad gold, %"] if any(arm["failures"]["bad gold"] for arm in arms) else []
    return table.only("arm", "right, %", to_first, f"pass@{n}, %", "majority, %", "unread, %", *bad_golds)


def _caption(record: Mapping[str, Any]) -> str:
    problems, protocol = record["problems"], record["protocol"]
    temperature, top_p = protocol["temperature"], protocol["top_p"]
    sampled = f"{protocol['samples']} samples each at temperature {temperature:g}, top-p {top_p:g}"
    return (
        f"{problems['name']}: {problems['count']} problems\n{sampled if temperature else 'greedy answers'}, "
        f"at most {protocol['max_new_tokens']:,} tokens\n"
        "[95% interval over problems], change paired by problem; unread by the grader"
    )
