"""What `chat --learn` and `serve --learn` begin before they serve."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from moe_bias.adapter import save_layer
from moe_bias.adapter.saved import CONFIG_FILE
from moe_bias.commands.looking_settings import ChatSettings, ServeSettings
from moe_bias.commands.run_lock import held
from moe_bias.config import ModelConfig, SpoolLimits
from moe_bias.frozen import Frozen, frozen
from moe_bias.learning.fresh import FRESH, fresh_layer
from moe_bias.learning.published import Published
from moe_bias.learning.service import Learning
from moe_bias.mistakes import UserError
from moe_bias.server.keys import LOOPBACK, Keys
from moe_bias.server.vllm_settings import VllmLearning
from moe_bias.variables import LEARNING

ONLY = "mine"
"""The adapter of someone who names none."""


def keys_of(settings: ChatSettings | ServeSettings) -> Keys:
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
    limits = settings.spool_limits()
    learning = Learning(root, given, base.head, settings.learn_config(), limits)
    try:
        named = keys.names or ([] if settings.adapters is not None else [ONLY])
        for name in named:
            if not (learning.adapters / name).exists():
                learning.begin(name, _fresh(root / FRESH, base))
    except BaseException:
        learning.close()
        raise
    for sentence in learning.said_changes():
        console.print(Text(sentence), soft_wrap=True)
    _announce(limits, root, console)
    return learning


def prepare_learning(settings: ServeSettings, keys: Keys, root: Path, console: Console) -> dict[str, str]:
    """What vLLM's server is to learn by, as a variable, and what it begins with; it opens the folder itself.

    Raises UserError where another server learns in the folder.
    """
    limits = settings.spool_limits()
    with held(root, "serve", [], option="--learn"):
        served = Published(root).names
        if any(not (served / name).exists() and not (settings.adapters / name).exists() for name in keys.names):
            _fresh(root / FRESH, frozen(ModelConfig(model=settings.model)))
    _announce(limits, root, console)
    learning = VllmLearning(
        root=root.absolute(),
        given=settings.adapters.absolute(),
        key_file=None if settings.key_file is None else settings.key_file.absolute(),
        config=settings.learn_config(),
        limits=limits,
        local=settings.host in LOOPBACK,
    )
    return {LEARNING: learning.model_dump_json()}


def _announce(limits: SpoolLimits, root: Path, console: Console) -> None:
    sentence = f"Answers can be taught: {limits}, are kept in memory, and what is learned in {str(root)!r}."
    console.print(Text(sentence), soft_wrap=True)


def _fresh(folder: Path, base: Frozen) -> Path:
    """An adapter that has learned nothing, made once."""
    if not (folder / CONFIG_FILE).exists():
        save_layer(fresh_layer(base), folder, base.model)
    return folder
