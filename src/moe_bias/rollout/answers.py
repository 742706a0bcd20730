"""Answers of several policies to the same problems: greedy, or several samples of each.

Every policy's rows share one batch and one cache, as in `greedy`. A problem's random numbers come from
its own seed and are the same for every policy: where two policies agree they draw the same tokens, so
that their difference is measured on what they do differently (common random numbers).

Shapes: B rows still running, N samples of the batch's problems, L token limit, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_bias.backbone import Head
from moe_bias.progress import Meter
from moe_bias.rollout.decoding import Answer, answer_batch
from moe_bias.rollout.draw import draw, nucleus
from moe_bias.rollout.policy import Policy, tokens_by_policy


@dataclass(frozen=True)
class AnswerChoices:
    """`samples` of each problem at a temperature, 0 being greedy, from the nucleus of mass `top_p`."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: Sequence[int]


def sampled_answers(
    model: nn.Module,
    head: Head,
    prompts: Sequence[list[int]],
    policies: Sequence[Policy],
    choices: AnswerChoices,
    seeds: Sequence[int],
    bar: Meter,
) -> list[list[list[Answer]]]:
    """Answers by prompt, policy and sample; all run in one batch. `seeds` has one for each prompt."""
    copies = len(policies) * choices.samples
    uniform_NL = _uniform(seeds, choices).to(head.device)

    def choose(hidden_BD: Tensor, number_B: Tensor, step: int) -> Tensor:
        sample_B = number_B // copies * choices.samples + number_B % choices.samples

        def pick(logits_BV: Tensor, place_B: Tensor) -> Tensor:
            if choices.temperature == 0:
                return logits_BV.argmax(-1)
            return _drawn(logits_BV / choices.temperature, uniform_NL[sample_B[place_B], step], choices.top_p)

        return tokens_by_policy(head, hidden_BD, number_B % copies // choices.samples, policies, pick)

    stop_ids, limit = choices.stop_ids, choices.max_new_tokens
    rows = iter(answer_batch(model, prompts, copies, choose, stop_ids=stop_ids, limit=limit, bar=bar))
    return [[[next(rows) for _ in range(choices.samples)] for _ in policies] for _ in prompts]


def _drawn(logits_BV: Tensor, uniform_B: Tensor, top_p: float) -> Tensor:
    return draw(logits_BV if top_p == 1 else nucleus(logits_BV, top_p), uniform_B).token


def _uniform(seeds: Sequence[int], choices: AnswerChoices) -> Tensor:
    """(N, L) float64 in [0, 1), a problem's samples from its seed; greedy answers need none."""
    size = (choices.samples, choices.max_new_tokens if choices.temperature > 0 else 0)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.rand(*size, dtype=torch.float64, generator=generator) for generator in generators])
