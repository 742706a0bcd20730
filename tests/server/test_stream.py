"""What is left of an answer whose client has gone."""

import asyncio
import threading

from helpers import loops
from helpers.chatting import running_engine, served_folder
from moe_bias.server import stream
from moe_bias.server.requests import read_chat
from moe_bias.server.stream import Telling


def test_nothing_goes_on_waiting_for_an_answer_that_nobody_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_LOOK_SECONDS", 0)

    async def leave(engine):
        body = {"model": "base", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 60}
        telling = Telling(engine, read_chat(body, engine, "base", 60))

        async def is_gone():
            return True

        assert await telling.whole(is_gone) is None
        assert telling.answering.is_called_off
        await asyncio.sleep(0.05)
        return asyncio.all_tasks() - {asyncio.current_task()}

    with running_engine(*served_folder(tmp_path)) as engine:
        held = threading.Event()  # so that no token comes before the client has gone
        holding = threading.Thread(target=engine.call, args=(held.wait,))
        holding.start()
        try:
            assert not loops.run(leave(engine))
        finally:
            held.set()
            holding.join()
