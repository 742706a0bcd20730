"""`moe-bias chat`: the server on transformers, and the address of its page."""

from __future__ import annotations

import threading
import time
import webbrowser
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.text import Text

from moe_bias.commands.learning import begin_learning, keys_of
from moe_bias.commands.looking_settings import ChatSettings
from moe_bias.commands.run_lock import held
from moe_bias.commands.served import check_port, damages_of, name_to_clients
from moe_bias.extras import need
from moe_bias.frozen import frozen, resolve_model
from moe_bias.mistakes import UserError
from moe_bias.progress import text_console
from moe_bias.server.keys import LOOPBACK, Keys

GRACE_SECONDS = 3
"""What answers that are being written have to end in when the server is stopped."""
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def run(settings: ChatSettings) -> None:
    """Serves until it is interrupted, and opens the page if asked.

    Raises UserError where the model, its chat template, the adapters or the port cannot be had.
    """
    for module in ("starlette", "uvicorn", "prometheus_client"):
        need(module, "a server on transformers")
    keys = keys_of(settings)
    check_port(settings.host, settings.port)
    console = text_console(stderr=True)
    for damage in [] if settings.adapters is None else damages_of(settings.adapters, may_have_others=False):
        console.print(Text(f"Requests for it are refused until it is mended: {damage}"), soft_wrap=True)
    with nullcontext() if settings.learn is None else held(settings.learn, "chat", [], option="--learn"):
        _serve(settings, keys, console)


def _serve(settings: ChatSettings, keys: Keys, console: Console) -> None:
    import uvicorn

    from moe_bias.server.app import make_app
    from moe_bias.server.engine import Engine
    from moe_bias.server.metrics import Counters
    from moe_bias.server.teaching import Teaching

    base = frozen(settings)
    if not base.tokenizer.chat_template:
        raise UserError(f"the tokenizer of {settings.model!r} has no chat template, so there is no chat with it")
    learning = begin_learning(settings, keys, base, console)
    engine = Engine(
        base,
        settings.adapters if learning is None else learning.adapters,
        None if learning is None else learning.spool.keep,
        rows=settings.rows,
        prefix_bytes=int(settings.cache_memory),
        adapter_bytes=int(settings.adapter_memory),
    )
    name = settings.served_name or name_to_clients(resolve_model(settings.model))
    counters = Counters()
    app = make_app(
        engine,
        [] if learning is None else Teaching.of_engine(engine, learning, keys, counters.learning).routes,
        name=name,
        limit=settings.max_new_tokens,
        local=settings.host in LOOPBACK,
        counters=counters,
        closing=None if learning is None else learning.close,
    )
    config = uvicorn.Config(
        app, settings.host, settings.port, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS
    )
    server = uvicorn.Server(config)
    threading.Thread(target=_announce, args=(server, settings, name, console), daemon=True).start()
    try:
        server.run()
    except KeyboardInterrupt:  # how a server is ended, and it has ended
        console.print("Stopped.")


def _announce(server: Any, settings: ChatSettings, name: str, console: Console) -> None:
    """Says where the server is, once it is there."""
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.05)
    host = _ANYWHERE.get(settings.host, settings.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    console.print(
        Text(f"{name} is at {address}/chat, for clients of OpenAI's protocol at {address}/v1"), soft_wrap=True
    )
    if settings.open:
        webbrowser.open(f"{address}/chat")
