"""What an edited answer costs the answers that are written meanwhile, read in a pass of its own or in theirs.

    step            the next token of all rows, through the frozen model
    apart           the same, then the edited text's new tokens in a pass of their own
    together        both in one pass
    two products    the output embedding's logits of the edited answer, and then of the one that was served
    one product     of both at once

All are from the same engine's parts, on random tokens. Ratios are of rates: above 1 is faster.

    uv run python benchmarks/learning_pass.py [--rows 4] [--new-tokens 12] [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import count

import torch

from moe_bias.frozen import Frozen, load
from moe_bias.server.batch import Batch
from moe_bias.server.prefixes import extended
from moe_bias.server.together import Text
from side_by_side import ratio, take_turns, write_record

OVER = {"together": "apart", "step": "apart", "one product": "two products"}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--held-tokens", type=int, default=60, help="of each row")
    parser.add_argument("--known-tokens", type=int, default=40, help="of the edited text")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    rates = take_turns(arms(load(options.model, device="cpu"), options), options.rounds)
    found = {arm: ratio(rates, arm, against) for arm, against in OVER.items()}
    for arm, over in found.items():
        print(f"{arm:14} over {OVER[arm]:14} {over}")
    ratios = {arm: vars(over) for arm, over in found.items()}
    write_record("learning_pass", {"options": vars(options), "rates": rates, "ratio": ratios})


def arms(base: Frozen, options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """What is timed; each returns 1."""
    rows, numbers = drawn(options.rows, options.held_tokens, 0), count(1)
    known = extended(base.model, None, drawn(1, options.known_tokens, 1)[0])
    hidden = torch.randn(2, options.new_tokens, base.head.hidden_size, generator=torch.Generator().manual_seed(2))
    tokens, batch = [5] * options.rows, Batch(base.model)
    for row in rows:
        batch.join(extended(base.model, None, row))

    def text() -> Text:
        return Text(known, (*known.tokens, *drawn(1, options.new_tokens, 10 + next(numbers))[0]))

    def step() -> int:
        batch.next(tokens)
        return 1

    def apart() -> int:
        batch.next(tokens)
        extended(base.model, known, text().tokens)
        return 1

    def together() -> int:
        batch.next_beside(tokens, [text()])
        return 1

    def two_products() -> int:
        for each in hidden:
            base.head.logits(each)
        return 1

    def one_product() -> int:
        base.head.logits(hidden.flatten(0, 1))
        return 1

    return {
        "step": step,
        "apart": apart,
        "together": together,
        "two products": two_products,
        "one product": one_product,
    }


def drawn(texts: int, tokens: int, seed: int) -> list[list[int]]:
    """Random tokens, always the same."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(10, 1000, (texts, tokens), generator=generator).tolist()
    return found


if __name__ == "__main__":
    main()
