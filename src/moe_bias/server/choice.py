"""The next token of one answer: the base's logits, moved by its adapters, and a token of them.

Shapes: D hidden, V vocabulary; rows are single, (1, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.combined import Part, summed_logits
from moe_bias.rollout.draw import draw, nucleus
from moe_bias.server.answer import Answering
from moe_bias.support import at_temperature

LIKELIEST = 5
"""Tokens that are told of each distribution."""


@dataclass(frozen=True)
class Choice:
    """A token, and its numbers where asked for."""

    token: int
    numbers: dict[str, Any] | None


def choose(
    head: Head,
    answering: Answering,
    hidden_1D: Tensor,
    logits_1V: Tensor,
    entropy_1: Tensor,
    spell: Callable[[Sequence[int]], str],
) -> Choice:
    """The next token of an answer, from the base's final logits and their entropy in nats."""
    asked, parts = answering.asked, answering.parts()
    policy_1V = summed_logits(parts, head.transform, hidden_1D, entropy_1, logits_1V)
    token = int(policy_1V.argmax(-1) if asked.temperature == 0 else _drawn(policy_1V, answering))
    numbers = None
    if asked.numbers:
        names = [name for name, _ in answering.layers]
        numbers = token_numbers(names, parts, hidden_1D, logits_1V, policy_1V, entropy_1, spell) | {"id": token}
    return Choice(token, numbers)


def _drawn(policy_1V: Tensor, answering: Answering) -> Tensor:
    heated_1V, top_p = at_temperature(policy_1V, answering.asked.temperature), answering.asked.top_p
    cut_1V = heated_1V if top_p == 1 else nucleus(heated_1V, top_p)
    return draw(cut_1V, answering.uniform().to(cut_1V.device)).token


def token_numbers(
    names: Sequence[str],
    parts: Sequence[Part],
    hidden_1D: Tensor,
    logits_1V: Tensor,
    policy_1V: Tensor,
    entropy_1: Tensor,
    spell: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    """What both models had to say where a token is written, at temperature 1, ready for JSON.

    `entropy`, `adapted_entropy` and `kl` (exact, adapted to base) in nats; `base` and `adapted` are the likeliest
    tokens with their probabilities; `move` is the largest change of a logit, `flip` whether another token is the
    likeliest. Of each adapter `name`, `strength`, the gate's `weight`, and the `experts` with their shares, largest
    first.
    """
    base_V, adapted_V = (logits.double().log_softmax(-1)[0] for logits in (logits_1V, policy_1V))
    prob_V = adapted_V.exp()
    numbers: dict[str, Any] = {
        "entropy": _short(entropy_1),
        "adapted_entropy": _short(-(prob_V * adapted_V.clamp(min=-1e4)).sum()),
        "kl": _short((prob_V * (adapted_V - base_V)).nansum()),
        "move": _short((policy_1V - logits_1V).abs().amax()),
        "flip": bool(base_V.argmax() != adapted_V.argmax()),
        "base": _likeliest(base_V, spell),
        "adapted": _likeliest(adapted_V, spell),
        "adapters": [],
    }
    for name, (layer, strength) in zip(names, parts, strict=True):
        mixture = layer.mix(hidden_1D, entropy_1)
        gates = mixture.routing.gates[0].topk(layer.config.top_k)
        experts = [[expert, _short(share)] for share, expert in zip(gates.values, gates.indices.tolist(), strict=True)]
        own = {"name": name, "strength": strength, "weight": _short(mixture.weight), "experts": experts}
        numbers["adapters"].append(own)
    return numbers


def _likeliest(log_prob_V: Tensor, spell: Callable[[Sequence[int]], str]) -> list[list[Any]]:
    top = log_prob_V.topk(min(LIKELIEST, len(log_prob_V)))
    return [
        [spell([token]), _short(value.exp())] for value, token in zip(top.values, top.indices.tolist(), strict=True)
    ]


def _short(value: Tensor) -> float:
    return float(f"{float(value):.5g}")
