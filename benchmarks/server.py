"""The server on transformers: many answers at once over one, and a conversation that is known over one that is not.

    alone        one answer by the library's own decoder, without a server
    one          the same answer by the engine of the server
    many         answers to eight prompts at once, each under an adapter of its own
    unknown      the first token of an answer to a long conversation of which nothing is known
    known        the same under an adapter that no answer to the conversation was under yet, while others were

Rates of the first three are tokens/s, of the others first tokens/s. The layers are random ones of the kind that the
package makes where nothing is chosen. The server's own routes and its page are not in it.

    uv run python benchmarks/server.py [--rounds 9] [--new-tokens 32] [--prompt-tokens 512]
"""

from __future__ import annotations

import argparse
import queue
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_bias.adapter.files import save_layer
from moe_bias.config import LayerConfig
from moe_bias.frozen import Frozen, load
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import meter
from moe_bias.rollout.answers import AnswerChoices, sampled_answers
from moe_bias.rollout.policy import layer_policy
from moe_bias.server.answer import Asked, Ended, Event, Failed
from moe_bias.server.engine import Engine
from random_layer import random_layer
from side_by_side import ratio, take_turns, write_record

ADAPTERS = 8
OVER = {"one": "alone", "many": "alone", "known": "unknown"}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    base = load(options.model)
    with TemporaryDirectory() as folder:
        for number in range(ADAPTERS):
            save_layer(random_layer(base.head, LayerConfig(), 0.1), Path(folder) / f"a{number}", base.model)
        rates = measure(base, Path(folder), options)
    found = {arm: ratio(rates, arm, against) for arm, against in OVER.items()}
    for arm, over in found.items():
        print(f"{arm:8} over {OVER[arm]:8} {over}")
    layer = LayerConfig().model_dump()
    ratios = {arm: vars(over) for arm, over in found.items()}
    write_record("server", {"options": vars(options), "layer": layer, "rates": rates, "ratio": ratios})


def measure(base: Frozen, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Rates of each arm in each round. The two engines take turns, as one model is not for two threads."""
    engine, forgetful = Engine(base, folder), Engine(base, folder, prefix_bytes=1)
    try:
        return take_turns(arms(base, engine, forgetful, options), options.rounds)
    finally:
        engine.close()
        forgetful.close()


def arms(base: Frozen, engine: Engine, forgetful: Engine, options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """What is timed; each returns the tokens that it gave."""
    short, long = prompts(ADAPTERS, 64), prompts(1, options.prompt_tokens)[0]
    names, number = [f"a{number}" for number in range(ADAPTERS)], count()
    limit = options.new_tokens
    answered(engine, [long], [None], 1)
    layer = random_layer(base.head, LayerConfig(), 0.1)
    return {
        "alone": lambda: alone(base, layer, short[0], limit),
        "one": lambda: answered(forgetful, short[:1], names[:1], limit),
        "many": lambda: answered(forgetful, short, names, limit),
        "unknown": lambda: answered(forgetful, [long], names[:1], 1),
        "known": lambda: answered(engine, [long], [names[next(number) % ADAPTERS]], 1),
    }


def prompts(number: int, tokens: int) -> list[list[int]]:
    """Random ones, always the same."""
    drawn = torch.randint(10, 1000, (number, tokens), generator=torch.Generator().manual_seed(0))
    return [row.tolist() for row in drawn]


def alone(base: Frozen, layer: MoEBiasLayer, prompt: list[int], limit: int) -> int:
    """The library's decoder, under the layer that the adapters are of; no token ends its answer."""
    choices = AnswerChoices(1, 0, 1, limit, [])
    with meter("", 1, "answers", visible=False) as bar:
        policies = [layer_policy(layer, base.head.transform)]
        ((answer,),) = sampled_answers(base.model, base.head, [prompt], policies, choices, [0], bar)[0]
    return len(answer.all_ids)


def answered(engine: Engine, asked: list[list[int]], adapters: list[str | None], limit: int) -> int:
    """Greedy answers at once; the tokens that they have together."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for prompt, name in zip(asked, adapters, strict=True):
        versions = {} if name is None else {name: engine.version(name)}
        engine.submit(Asked(prompt, versions, temperature=0.0, limit=limit), events.put)
    tokens = ended = 0
    while ended < len(asked):
        event: Any = events.get()
        assert not isinstance(event, Failed), event.sentence
        if isinstance(event, Ended):
            ended, tokens = ended + 1, tokens + event.tokens
    return tokens


if __name__ == "__main__":
    main()
