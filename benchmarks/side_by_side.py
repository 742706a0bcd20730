"""Timing arms side by side on a shared, noisy machine, and keeping the record.

Arms take turns in every round, in shuffled order, and are compared by the median of the rounds'
ratios: what slows the machine for a while slows all arms of the rounds it falls in.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from moe_bias.records import provenance, write_json

RECORDS = Path(__file__).parent.parent / "records" / "benchmarks"


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of one arm's rate over another's, with a 95% bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:8.3f}x [{self.low:.3f}, {self.high:.3f}]"


def take_turns(arms: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Units per second of each arm in each round; an arm returns its units. One round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    shuffler = random.Random(0)
    for turn in range(rounds + 1):
        for name in shuffler.sample(list(arms), len(arms)):
            start = time.perf_counter()
            units = arms[name]()
            if turn > 0:
                rates[name].append(units / (time.perf_counter() - start))
    return rates


def wait() -> None:
    """An accelerator returns before it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(rates: Mapping[str, list[float]], arm: str, against: str) -> Ratio:
    """How many times as fast `arm` is as `against`."""
    ratios = np.array(rates[arm]) / np.array(rates[against])
    interval = bootstrap((ratios,), np.median, rng=np.random.default_rng(0), method="percentile").confidence_interval
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))


def write_record(name: str, content: Mapping[str, Any]) -> None:
    """Keeps what a benchmark measured, with the machine it ran on."""
    now = datetime.now(UTC)
    path = RECORDS / f"{name}-{now:%Y%m%dT%H%M%S}.json"
    write_json(path, {**content, "time": now.isoformat(timespec="seconds"), "provenance": provenance()})
    print(f"record: {path.relative_to(RECORDS.parent.parent)}")
