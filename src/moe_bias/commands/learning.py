"""What `chat --learn` and `serve --learn` begin before they serve."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from moe_bias.adapter import save_layer
from moe_bias.adapter.saved import CONFIG_FILE
from moe_bias.commands.looking_settings import ChatSettings
from moe_bias.config import LearnConfig
from moe_bias.frozen import Frozen
from moe_bias.learning.fresh import fresh_layer
from moe_bias.learning.service import Learning
from moe_bias.learning.spool import SpoolLimits
from moe_bias.mistakes import UserError
from moe_bias.server.keys import LOOPBACK, Keys

ONLY = "mine"
"""The adapter of someone who names none."""


def keys_of(settings: ChatSettings) -> Keys:
    """Who may teach. Raises UserError on a damaged file, and where anyone on the network could."""
    if settings.key_file is None:
        if settings.learn is not None and settings.host not in LOOPBACK:
            raise UserError(
                f"--host {settings.host} lets whoever reaches this machine teach; say who may, with --key-file"
            )
        return Keys()
    if settings.learn is None:
        raise UserError(
            f"--key-file {str(settings.key_file)!r} says who may teach, and nothing learns without --learn FOLDER"
        )
    return Keys.read(settings.key_file)


def begin_learning(settings: ChatSettings, keys: Keys, base: Frozen, console: Console) -> Learning | None:
    """The adapters and the process that learns, and a word on what is kept; None without --learn."""
    root = settings.learn
    if root is None:
        return None
    given = settings.adapters or root / "given"
    if settings.adapters is None:
        given.mkdir(parents=True, exist_ok=True)
    limits = SpoolLimits()
    learning = Learning(root, given, base.head, LearnConfig(), limits)
    try:
        named = keys.names or ([] if settings.adapters is not None else [ONLY])
        for name in named:
            if not (learning.adapters / name).exists():
                learning.begin(name, _fresh(root / "fresh", base))
    except BaseException:
        learning.close()
        raise
    console.print(
        Text(f"Answers can be taught: {limits}, are kept in memory, and what is learned in {str(root)!r}."),
        soft_wrap=True,
    )
    return learning


def _fresh(folder: Path, base: Frozen) -> Path:
    """An adapter that has learned nothing, made once."""
    if not (folder / CONFIG_FILE).exists():
        save_layer(fresh_layer(base), folder, base.model)
    return folder
