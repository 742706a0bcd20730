"""Answers of several policies to the same problems, from one model and one cache: greedy, or several samples of each.

A policy changes logits after the output embedding and the backbone never sees it, so every policy's
rows share one batch, prompts are computed once for all policies, and finished rows are dropped. A problem's
random numbers come from its own seed and are the same for every policy: where two policies agree they draw the
same tokens, so that their difference is measured on what they do differently (common random numbers).

Shapes: B rows still running, N samples of the batch's problems, L token limit, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_bias.backbone import Head
from moe_bias.chunks import longest_first
from moe_bias.progress import Meter, meter
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


def greedy_answers(
    model: nn.Module,
    head: Head,
    prompts: Sequence[list[int]],
    policies: Sequence[Policy],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    later_policies: Sequence[Policy] | None = None,
    description: str = "answers",
) -> list[list[Answer]]:
    """Answers by policy, then by prompt. `batch_size` counts prompts; each has a row per policy.

    `later_policies` choose from the second token on: the base policy stands there for a policy that
    acts on the first token only. By default they are the same.
    """
    choices = AnswerChoices(1, 0, 1, max_new_tokens, stop_ids)
    answers: list[list[Answer]] = [[Answer([], None)] * len(prompts) for _ in policies]
    with meter(description, len(prompts) * len(policies), "answers") as bar:
        for batch in longest_first(prompts, batch_size):
            asked, seeds = [prompts[number] for number in batch], [0] * len(batch)
            found = sampled_answers(model, head, asked, policies, choices, seeds, bar, later_policies)
            for number, of_policies in zip(batch, found, strict=True):
                for column, (answer,) in zip(answers, of_policies, strict=True):
                    column[number] = answer
    return answers


def sampled_answers(
    model: nn.Module,
    head: Head,
    prompts: Sequence[list[int]],
    policies: Sequence[Policy],
    choices: AnswerChoices,
    seeds: Sequence[int],
    bar: Meter,
    later_policies: Sequence[Policy] | None = None,
) -> list[list[list[Answer]]]:
    """Answers by prompt, policy and sample; all run in one batch. `seeds` has one for each prompt.

    `later_policies`: see `greedy_answers`.
    """
    later = policies if later_policies is None else later_policies
    assert len(later) == len(policies)
    copies = len(policies) * choices.samples
    uniform_NL = _uniform(seeds, choices).to(head.device)

    def choose(hidden_BD: Tensor, number_B: Tensor, step: int) -> Tensor:
        sample_B = number_B // copies * choices.samples + number_B % choices.samples

        def pick(logits_BV: Tensor, place_B: Tensor) -> Tensor:
            if choices.temperature == 0:
                return logits_BV.argmax(-1)
            return _drawn(logits_BV / choices.temperature, uniform_NL[sample_B[place_B], step], choices.top_p)

        now = policies if step == 0 else later
        return tokens_by_policy(head, hidden_BD, number_B % copies // choices.samples, now, pick)

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
