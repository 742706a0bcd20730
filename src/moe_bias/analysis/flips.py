"""Places where base and adapted model choose another token, and how each goes on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_bias.analysis.answers import (
    ADAPTED,
    BASE,
    HIGH_ONLY,
    LOW_ONLY,
    RIGHT,
    Answered,
    accuracy,
    first_difference,
    in_stratum,
    turns,
)
from moe_bias.analysis.matter import Matter, Options
from moe_bias.analysis.moments import Moment, moment_at
from moe_bias.analysis.readings import read_tokens
from moe_bias.analysis.record import estimate_record, moment_record, token_record
from moe_bias.analysis.survey import Marks
from moe_bias.features.extract import Features
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import Policy, base_policy
from moe_bias.tasks.conversations import answer_ends
from moe_bias.training.problems import TaskData, greedy_graded, policy_of


def kept_flips(adapter: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Of an adapter's entry on a text the flips of largest KL; on answers those that turned a verdict: from wrong to
    right, or the other way round.
    """
    if adapter["answers"] is None:
        found: Sequence[Mapping[str, Any]] = adapter["flips"]
        return found
    changed = adapter["answers"]["flips"]
    return [flip for flip in changed if (flip["base_outcome"] == RIGHT) != (flip["adapted_outcome"] == RIGHT)]


def text_flips(
    matter: Matter, layer: MoEBiasLayer, moments: Sequence[Moment], options: Options
) -> list[dict[str, Any]]:
    """The moments with both greedy continuations, the choices themselves first, where the prompts are known."""
    records = [moment_record(moment, matter.decode) for moment in moments]
    ways: list[list[str]] | list[list[None]] = [[None] * len(moments)] * 2
    if matter.examples:
        base, prefixes = matter.base, []
        for moment in moments:
            example = matter.examples[moment.example]
            prefixes.append(example.prompt_ids + example.completion_ids[: moment.position])
        found = greedy_answers(
            base.model,
            base.head,
            prefixes,
            [base_policy, policy_of(layer, base.head)],
            stop_ids=answer_ends(base.model, base.tokenizer),
            max_new_tokens=options.continuation,
            batch_size=options.batch_size,
            description="both ways from the flips",
        )
        ways = [[matter.decode(answer.token_ids) for answer in column] for column in found]
    return [
        record | {"base_continuation": base_way, "adapted_continuation": adapted_way}
        for record, base_way, adapted_way in zip(records, *ways, strict=True)
    ]


def greedy_answered(
    ground: TaskData, policies: Sequence[Policy], options: Options, description: str
) -> list[list[Answered]]:
    """Greedy answers to the held-out problems with their verdicts, by policy, then by problem."""
    limit, batch_size = options.max_new_tokens, options.batch_size
    columns = greedy_graded(ground, ground.test, policies, limit, batch_size, description)
    return [[Answered(answer.token_ids, answer.verdict.outcome) for answer in column] for column in columns]


def answer_record(
    matter: Matter, ground: TaskData, layer: MoEBiasLayer, marks: Marks, options: Options
) -> dict[str, Any]:
    """The layer's greedy answers against the frozen model's."""
    policy = policy_of(layer, ground.head)
    policies = [policy, *(in_stratum(policy, marks.threshold, is_high) for is_high in (True, False))]
    columns = greedy_answered(ground, policies, options, "answers, and by stratum alone")
    arms = dict(zip((BASE, ADAPTED, HIGH_ONLY, LOW_ONLY), [list(matter.answers), *columns], strict=True))
    right = accuracy(arms)
    flips = _answer_flips(matter, ground, layer, arms[ADAPTED], options)
    is_high = [flip["base_entropy"] >= marks.threshold for flip in flips]
    return {
        "accuracy": {arm: estimate_record(share) for arm, share in right.share.items()},
        "change": {arm: estimate_record(change) for arm, change in right.change.items()},
        "turns": turns(arms[BASE], arms[ADAPTED]),
        "unchanged": len(arms[BASE]) - len(flips),
        "flips_high": sum(is_high) / len(is_high) if is_high else None,
        "flips": flips,
    }


def _answer_flips(
    matter: Matter, ground: TaskData, layer: MoEBiasLayer, adapted: Sequence[Answered], options: Options
) -> list[dict[str, Any]]:
    """Of each problem whose answer changed."""
    features, decode = matter.text.source, matter.decode
    assert isinstance(features, Features), "sampled answers are held in memory"
    pairs = list(zip(matter.answers, adapted, strict=True))
    places = [first_difference(base.token_ids, other.token_ids) for base, other in pairs]
    changed = [(problem, place) for problem, place in enumerate(places) if place is not None]
    starts = torch.searchsorted(features.example, torch.arange(len(pairs)))
    rows = [int(starts[problem]) + place for problem, place in changed]
    readings = read_tokens(layer, ground.head, features.hidden[rows], features.token[rows])
    records = []
    for number, (problem, place) in enumerate(changed):
        base, other = pairs[problem]
        question = ground.test.problems[problem]
        moment = moment_at(features, rows[number], readings, number, float(readings.kl[number]))
        records.append(
            moment_record(moment, decode)
            | {
                "adapted_choice": token_record(other.token_ids[place], decode),
                "question": question.question,
                "gold": question.gold,
                "base_outcome": base.outcome,
                "adapted_outcome": other.outcome,
                "base_continuation": decode(base.token_ids[place : place + options.continuation]),
                "adapted_continuation": decode(other.token_ids[place : place + options.continuation]),
            }
        )
    return records
