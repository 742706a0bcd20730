"""What every server asks before it starts: whether it can listen, and what is in the folder of adapters."""

from __future__ import annotations

import socket
from pathlib import Path

from moe_bias.adapter.saved import CONFIG_FILE, read_saved
from moe_bias.mistakes import UserError
from moe_bias.serving.versions import adapter_names


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        place = f"--host {host} --port {port}"
        raise UserError(f"a server cannot listen at {place}, choose others: {error.strerror}") from error


def damages_of(folder: Path, may_have_others: bool) -> list[str]:
    """What is wrong with adapters of the folder, which may be empty at first: they may come while it serves.

    Raises UserError where none of them can be read, and on a folder of other things that is to have adapters alone.
    """
    if not folder.is_dir():
        raise UserError(f"--adapters {str(folder)!r} is not a folder")
    names = adapter_names(folder)
    if not names and not may_have_others and any(folder.iterdir()):
        raise UserError(
            f"--adapters {str(folder)!r} holds other things but no adapter, that is no folder with a file "
            f"{CONFIG_FILE}; name a folder of adapters, or an empty one"
        )
    damages = []
    for name in names:
        try:
            read_saved(str(folder / name))
        except UserError as error:
            damages.append(str(error))
    if damages and len(damages) == len(names):
        raise UserError(f"no adapter in --adapters {str(folder)!r} can be read: {damages[0]}")
    return damages


def name_to_clients(model: str) -> str:
    """A model's name where none was given: its folder's, or its Hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model
