"""Both models' greedy answers to one prompt, read token by token."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from moe_bias.analysis.inspection import InspectedAnswer, InspectedToken, Inspection
from moe_bias.analysis.readings import TokenReadings, TopTokens, read_tokens, top_tokens
from moe_bias.features.extract import run_backbone
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import base_policy, layer_policy
from moe_bias.support import fork_threshold
from moe_bias.tasks.conversations import Conversation, Example, answer_ends, encode_prompt

NAMES = ("base", "adapted")


def inspect(
    base: Frozen,
    layer: MoEBiasLayer,
    model: str,
    adapter: str,
    prompt: str,
    chat: bool,
    limit: int,
    top: int,
    rho: float,
) -> Inspection:
    """Both greedy answers, of at most `limit` tokens with their end token, read by both models; `model` and `adapter`
    are their names. `chat` puts the prompt into the chat template; distributions have their `top` likeliest tokens.
    """
    prompt_ids = encode_prompt(Conversation(({"role": "user", "content": prompt},), "", is_chat=chat), base.tokenizer)
    columns = greedy_answers(
        base.model,
        base.head,
        [prompt_ids],
        [base_policy, layer_policy(layer, base.head.transform)],
        stop_ids=answer_ends(base.model, base.tokenizer, chat),
        max_new_tokens=limit,
        batch_size=1,
    )
    answers, entropies = [], []
    for name, (answer,) in zip(NAMES, columns, strict=True):
        readings, likeliest = _read(base, layer, Example(prompt_ids, answer.all_ids), top)
        tokens = _tokens(base.tokenizer, answer.all_ids, readings, likeliest)
        answers.append(InspectedAnswer(name, answer.finished, tokens))
        entropies.append(readings.base_entropy)
    return Inspection(model, adapter, prompt, rho, fork_threshold(torch.cat(entropies), rho), answers)


def _read(base: Frozen, layer: MoEBiasLayer, example: Example, top: int) -> tuple[TokenReadings, TopTokens]:
    """What both models make of an answer's tokens, from one pass of the backbone."""
    hidden = run_backbone(base.model, [example], 1, "reading")
    readings = read_tokens(layer, base.head, hidden.hidden, hidden.token)
    return readings, top_tokens(layer, base.head, hidden.hidden, min(top, base.head.vocab_size))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], readings: TokenReadings, top: TopTokens
) -> list[InspectedToken]:
    def spelled(ids: torch.Tensor, probs: torch.Tensor) -> list[tuple[str, float]]:
        return [(tokenizer.decode([number]), prob) for number, prob in zip(ids.tolist(), probs.tolist(), strict=True)]

    return [
        InspectedToken(
            text=tokenizer.decode([token]),
            id=token,
            entropy=float(readings.base_entropy[t]),
            adapted_entropy=float(readings.adapted_entropy[t]),
            base=spelled(top.base_ids[t], top.base_probs[t]),
            adapted=spelled(top.adapted_ids[t], top.adapted_probs[t]),
            experts=list(zip(readings.experts[t].tolist(), readings.gates[t].tolist(), strict=True)),
            weight=float(readings.weight[t]),
            kl=float(readings.kl[t]),
            bias=float(readings.bias_max[t]),
            flip=bool(readings.flipped[t]),
        )
        for t, token in enumerate(token_ids)
    ]
