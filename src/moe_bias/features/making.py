"""Making a feature store, or finding it made: what `extract` does, and every command that is given data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from torch import nn

from moe_bias.backbone import Head
from moe_bias.features.build import Maker, Plan, extract
from moe_bias.features.manifest import Manifest
from moe_bias.features.writer import StoreFolder
from moe_bias.limits import in_bytes
from moe_bias.mistakes import UserError
from moe_bias.progress import say

LOCK = ".lock"
"""Held by the process that makes the store; a name with a dot is no file of a store."""


def made(model: nn.Module, head: Head, plan: Plan, folder: Path, console: Console, by: Maker | None = None) -> Manifest:
    """The store that the plan describes: found, continued, or made after saying what it will cost.

    The shards are made by the model in this process where nothing else does (`by`). Waits for another process that is
    making it. Raises UserError and Interrupted as `extract` does.
    """
    store = StoreFolder.begun(folder, plan.recipe)
    if store.is_complete:
        manifest = store.begun_manifest
        say(console, f"hidden states found in {folder}, {in_bytes(manifest.bytes)}: the model is not run for them")
        return manifest
    store.check_disk(plan.bytes)
    say(console, f"{cost(plan)}, in {folder}")
    if store.was_complete:
        say(console, f"{_few(store.missing())} of {len(plan.shards)} are damaged or missing there, and made anew")
    with _alone_in(folder, console):
        return extract(model, head, plan, folder, by)


def _few(numbers: Sequence[int]) -> str:
    """Shards by number, those beyond the first few counted."""
    named = ", ".join(str(number) for number in numbers[:5])
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"shards {named}{more}"


def cost(plan: Plan) -> str:
    """What has to be done for the whole plan, and what that takes on the disk."""
    number, parts = plan.recipe.part
    part = f"part {number}/{parts}: " if parts > 1 else ""
    through = sum(len(example) for example in plan.examples)
    kept = "" if plan.recipe.keep_top is None else f" for the {plan.recipe.keep_top:.0%} of highest entropy"
    return (
        f"{part}{plan.tokens:,} completion tokens of {len(plan.examples):,} examples, {through:,} tokens through the "
        f"model; {len(plan.shards)} shards, about {in_bytes(plan.bytes)}{kept}"
    )


@contextmanager
def _alone_in(folder: Path, console: Console) -> Iterator[None]:
    """Holds a lock on the folder, which the system releases even where the process is killed."""
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        say(console, f"another process is making the store in {folder}; waiting for it")
        lock.acquire()
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written ({error.strerror}); name another folder") from error
    try:
        yield
    finally:
        lock.release()
