"""An objective is tried on a few made-up tokens before training begins, so that a mistake in it costs no run."""

from __future__ import annotations

import torch

from moe_bias.divergence import Divergences, TargetScalars
from moe_bias.features.extract import Features
from moe_bias.features.target import TargetTokens
from moe_bias.mistakes import UserError, reason_of
from moe_bias.support import RestScalars
from moe_bias.training.objectives import Distribution, Now, Objective, Sampled, Then, check_terms, name_of, wants_target

_TRIED = 4
"""Tokens that an objective is tried on before a run."""


def check_objective(objective: Objective, with_samples: bool, with_target: bool = False) -> None:
    """Tries an objective on a few made-up tokens. Raises UserError where it cannot be used in training.

    `with_samples`: whether training gives advantages and sampled log-probabilities; `with_target`: whether it is
    towards a target model.
    """
    known = ("needs_stats", "unit")
    if not callable(objective) or not all(hasattr(objective, name) for name in known):
        raise UserError(f"objective {name_of(objective)} is none: make it a subclass of Objective that can be called")
    if objective.unit not in ("token", "answer", "pair"):
        raise UserError(f"objective {name_of(objective)}: `unit` is {objective.unit!r}; known are token, answer, pair")
    if wants_target(objective) and not with_target:
        raise UserError(
            f"objective {name_of(objective)} needs a target model to come nearer to, which moe_bias.train_draft has"
        )
    now, then = _made_up(objective.needs_stats, with_samples, with_target)
    try:
        terms = objective(now, then)
    except Exception as error:
        raise UserError(f"objective {name_of(objective)} failed on a first trial ({reason_of(error)})") from error
    check_terms(terms, then.units(objective.unit), objective)
    if not terms.loss.requires_grad:
        raise UserError(f"objective {name_of(objective)}: the loss does not depend on `now`, so nothing can be learnt")


def _made_up(with_stats: bool, with_samples: bool, with_target: bool) -> tuple[Now, Then]:
    """A few tokens of two answers."""
    value_T = torch.linspace(0.1, 1.0, _TRIED)
    number_T = torch.arange(_TRIED)
    features = Features(
        hidden=value_T[:, None],
        token=number_T,
        example=number_T * 2 // _TRIED,
        position=number_T % 2,
        logit=-value_T,
        entropy=value_T,
        log_partition=value_T.double(),
        rest=RestScalars(value_T.double() - 1, value_T.double() - 2),
        column=number_T,
        support=number_T,
        target=TargetTokens(value_T[:, None], TargetScalars(*[value_T.double()] * 4)) if with_target else None,
    )
    leaves = [value_T.clone().requires_grad_() for _ in range(5)]
    whole = Distribution(leaves[1], leaves[2]) if with_stats else None
    sampled = Sampled(-1.1 * value_T, value_T - 0.5) if with_samples else None
    return Now(-leaves[0], whole, Divergences(*leaves[3:]) if with_target else None), Then(features, sampled)
