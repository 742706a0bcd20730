"""Tables of the records of learning while serving."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moe_bias.evaluation.statistics import Estimate
from moe_bias.report.table import Column, Table

RECORDS = Path(__file__).parent.parent / "records" / "learning"
_DRAWS = 2000
ARMS = {
    "base": "the model alone",
    "prompt": "the last 4 corrections in the prompt",
    "static": "one direction, no router",
    "ours": "MoE-Bias, as served",
    "lora": "LoRA r = 8, updated likewise",
}


def quality() -> tuple[Table, str]:
    """Each arm over all tenants: exact answers and likelihood by the number of corrections, and what it costs."""
    record = _read("smollm2-135m")
    arms, interactions = record["arms"], len(record["arms"]["base"]["tenants"][0]["nll"])
    bounds = [0, *(interactions * part // 4 for part in (1, 2, 3, 4))]
    rows = []
    for name, title in ARMS.items():
        if name in arms:
            rows.append({"arm": title, **_row(arms[name]["tenants"], bounds)})
    columns = [Column("", ("arm",), words=True)]
    for start, end in pairwise(bounds):
        columns.append(Column(f"after {start} to {end - 1}", (f"exact-{start}",), "{:.0f}", 100))
    columns += [
        Column("nats a token, second half", ("nll",), "{:.2f}"),
        Column("prompt tokens", ("prompt_tokens",), "{:.0f}"),
        Column("seconds a correction", ("seconds",), "{:.2f}"),
    ]
    tenants = len(arms["base"]["tenants"])
    note = (
        f"Exact answers, percent, of {tenants} tenants with {interactions} interactions each, tested before the "
        "correction; mean and 95% interval over tenants. Seconds are on a machine with other work."
    )
    return Table("learning", "", columns, rows), note


def by_kind() -> tuple[Table, str]:
    """Exact answers of the second half by what the tenants want."""
    record = _read("smollm2-135m")
    kinds = list(dict.fromkeys(tenant["kind"] for tenant in record["arms"]["base"]["tenants"]))
    rows = []
    for name, title in ARMS.items():
        if name in record["arms"]:
            row: dict[str, Any] = {"arm": title}
            for kind in kinds:
                tenants = [one for one in record["arms"][name]["tenants"] if one["kind"] == kind]
                halves = [one["exact"][len(one["exact"]) // 2 :] for one in tenants]
                row[kind] = float(np.mean(halves))
            rows.append(row)
    columns = [Column("", ("arm",), words=True), *(Column(kind, (kind,), "{:.0f}", 100) for kind in kinds)]
    return Table("learning-kinds", "", columns, rows), "Percent of the second half, means over tenants."


def load() -> tuple[Table, str]:
    """Milliseconds from feedback to the served version, and what answers lose."""
    record = _read("load-smollm2-135m")
    choices = record["choices"]
    ratios = np.array([one["learning"] / one["plain"] for one in record["rounds"]])
    rows = [{"what": "alone", **record["latency"]}]
    loaded = [one["milliseconds"] for one in record["loaded"]]
    rows.append(
        {
            "what": f"beside {choices['clients']} clients that ask all the time",
            "corrections": sum(one["corrections"] for one in record["loaded"]),
            "milliseconds": {key: float(np.median([one[key] for one in loaded])) for key in loaded[0]},
        }
    )
    columns = [
        Column("", ("what",), words=True),
        Column("corrections", ("corrections",), "{:,}"),
        Column("median, ms", ("milliseconds", "0.5"), "{:.0f}"),
        Column("90%", ("milliseconds", "0.9"), "{:.0f}"),
        Column("99%", ("milliseconds", "0.99"), "{:.0f}"),
        Column("the update alone, median", ("update_milliseconds", "0.5"), "{:.0f}"),
    ]
    share = _mean_of(ratios)
    before, after = record["memory"][0], record["memory"][-1]
    note = (
        f"{choices['tenants']} tenants, {choices['rate']:g} corrections a second together. Tokens a second of the "
        f"clients with corrections over without: {share.value:.2f} [{share.low:.2f}, {share.high:.2f}], "
        f"{len(ratios)} rounds in turn. Resident memory of the server {_mib(before['server'])} at first and "
        f"{_mib(after['server'])} at the end, of the process that learns {_mib(before['learner'])} and "
        f"{_mib(after['learner'])}. "
        f"{record['machine']['processor']}, {record['machine']['cores']} cores."
    )
    return Table("learning-load", "", columns, rows), note


def soak() -> str:
    """Some sentences about the simulation."""
    record = _read("soak")
    seen, counts, same = record["seen"], record["counts"], record["same_bytes"]
    largest = max(one["largest_journal"] for one in seen)
    server = " and ".join(_mib(seen[len(seen) * part // 4 - 1]["server"]) for part in (2, 4))
    return (
        f"{record['lessons']:,} pieces of feedback to {record['choices']['tenants']} adapters of a tiny model in "
        f"{record['seconds'] / 60:.0f} minutes, each with one outcome: {counts['applied']:,} learned from, "
        f"{counts['published']:,} versions; kills of the process that learns: {counts.get('killed', 0)}. "
        f"Resident memory of the server's end was {server} at half and at the end, of the process "
        f"{_most_and_last(seen)}; the longest journal had {largest / 2**20:.1f} MiB. Made again from their journals "
        f"{same['from journals']} adapters had the same bytes, and so had {same['from the first']} of "
        f"{record['choices']['told_again']} that a learner was told from the first entry on without being disturbed.\n"
    )


def _most_and_last(seen: list[dict[str, Any]]) -> str:
    """Of the second half: a process that is killed begins with little."""
    sizes = [one["learner"] for one in seen[len(seen) // 2 :]]
    return f"{_mib(max(sizes))} at most in the second half and {_mib(sizes[-1])} at its end"


def lasting() -> str:
    """Some sentences about everything at once."""
    record = _read("lasting")
    choices, actions = record["choices"], record["actions"]
    asked = sum(actions.get(name, 0) for name in ("ask", "check")) + 2 * actions.get("prefer", 0)
    faults = f"{len(record['faults'])} faults were found" if record["faults"] else "no fault was found"
    slopes = [
        f"of {title} {found['slope']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"
        for title, found in (
            ("the server", record["slopes"]["server"]),
            ("the process that learns", record["slopes"]["learner"]),
        )
    ]
    return (
        f"{choices['seconds'] / 60:.0f} minutes, {choices['tenants']} tenants, {choices['clients']} clients: {asked:,} "
        f"answers and {actions.get('leave', 0):,} that were left in the middle, {record['acknowledged']:,} events "
        f"acknowledged, {record['published']:,} versions published; the server was killed "
        f"{len(choices['server_kills'])} times and the process that learns {len(choices['learner_kills'])} times, "
        f"which left {record['without_reply']} events without a reply. {record['greedy_tokens']:,} tokens of greedy "
        f"answers were looked at: {faults}. Resident memory in MiB a minute: {', '.join(slopes)}.\n"
    )


def _row(tenants: list[dict[str, Any]], bounds: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for start, end in pairwise(bounds):
        row[f"exact-{start}"] = _mean_of(np.array([np.mean(one["exact"][start:end]) for one in tenants]))
    half = bounds[2]
    row["nll"] = _mean_of(np.array([np.mean(one["nll"][half:]) for one in tenants]))
    row["prompt_tokens"] = float(np.mean([one["prompt_tokens"] for one in tenants]))
    row["seconds"] = float(np.median([second for one in tenants for second in one["learn_seconds"]]))
    return row


def _mean_of(values: Any) -> Estimate:
    """The mean and its interval, by drawing again with replacement."""
    drawn = np.random.default_rng(0).choice(values, (_DRAWS, len(values))).mean(-1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return found
