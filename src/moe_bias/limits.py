"""What no machine can do, refused before it is begun, with an estimate of what it would take."""

from __future__ import annotations

import os

from moe_bias.mistakes import UserError

LARGEST_COUNT = 2**32 - 1
"""The largest seed that numpy takes, and more than any run can count."""
LARGEST_SIZE = 2**60
"""Bytes that a setting may name."""
LARGEST_NUMBER = 1e30
"""Products of larger numbers are no float32."""
LONGEST_ANSWER = 2**20
"""Tokens; no model reads more."""
MOST_STEPS = 10**9
SECONDS_OF_A_STEP = 1e-3
"""What the smallest optimiser step takes."""
MOST_TOKENS = 10**12
TOKENS_A_SECOND = 1e4
"""What a fast machine samples."""
_DAY = 86400


def machine_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def refuse_beyond_memory(needed: float, what: str, remedy: str) -> None:
    """Raises UserError where so many bytes are more than the machine has; `what` would take them."""
    there = machine_bytes()
    if there is not None and needed > there:
        raise UserError(f"{what} would take {in_bytes(needed)} and this machine has {in_bytes(there)}; {remedy}")


def refuse_endless_steps(steps: int, what: str, remedy: str) -> None:
    """Raises UserError on more optimiser steps than anyone waits for."""
    if steps > MOST_STEPS:
        days = in_days(steps * SECONDS_OF_A_STEP)
        raise UserError(
            f"{what} are {in_short(steps)} optimiser steps, {days} at a millisecond each, and at most "
            f"{in_short(MOST_STEPS)} can be run; {remedy}"
        )


def endless_sampling(tokens: int, what: str, remedy: str) -> str | None:
    """The sentence on more tokens to sample than anyone waits for, or None."""
    if tokens <= MOST_TOKENS:
        return None
    days = in_days(tokens / TOKENS_A_SECOND)
    return (
        f"{what} are up to {in_short(tokens)} tokens to sample, {days} at {TOKENS_A_SECOND:,.0f} a second, and at "
        f"most {in_short(MOST_TOKENS)} can be asked for; {remedy}"
    )


def in_bytes(count: float) -> str:
    """A size in the largest unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def in_time(seconds: float) -> str:
    """A duration in the largest unit that leaves a number above 1.5."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds > 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def in_days(seconds: float) -> str:
    """A long time in days, or in years."""
    days = seconds / _DAY
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365:,.0f} years"


def in_short(count: int) -> str:
    """A number with its thousands apart, a long one by its power of ten."""
    return f"{count:,}" if count < 10**15 else f"{float(count):.2g}"
