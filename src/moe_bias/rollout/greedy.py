"""Greedy answers of several policies at once, from one model and one cache.

A policy changes logits after the output embedding and the backbone never sees it, so every policy's
rows share one batch, prompts are computed once for all policies, and finished rows are dropped.

Shapes: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moe_bias.backbone import Head
from moe_bias.progress import meter
from moe_bias.rollout.decoding import Answer, answer_batch, longest_first
from moe_bias.rollout.policy import Policy, tokens_by_policy


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
    later = policies if later_policies is None else later_policies
    assert len(later) == len(policies)

    def choose(hidden_BD: Tensor, number_B: Tensor, step: int) -> Tensor:
        now = policies if step == 0 else later
        return tokens_by_policy(head, hidden_BD, number_B % len(policies), now, _most_likely)

    answers: list[list[Answer]] = [[Answer([], None)] * len(prompts) for _ in policies]
    with meter(description, len(prompts) * len(policies), "answers") as bar:
        for batch in longest_first(prompts, batch_size):
            found = answer_batch(
                model,
                [prompts[index] for index in batch],
                len(policies),
                choose,
                stop_ids=stop_ids,
                limit=max_new_tokens,
                bar=bar,
            )
            for row, answer in enumerate(found):
                answers[row % len(policies)][batch[row // len(policies)]] = answer
    return answers


def _most_likely(logits_BV: Tensor, place_B: Tensor) -> Tensor:
    return logits_BV.argmax(-1)
