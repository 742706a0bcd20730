"""Objectives: what training minimises, a function of what the layer's policy says of each token.

A loss is a mean over its units: tokens, answers, or pairs of answers. An objective gives the loss of each unit and
knows nothing of batches, chunks or processes: `gradients` calls it, divides by the number of units, adds the
load-balance loss (arXiv 2101.03961) and takes the gradient, a chunk of tokens at a time. Where the unit is a token an
objective sees the tokens of one chunk; else those of a whole batch, which then holds whole units.

    Supervised   -log pi'(y_t) + kl_weight KL(pi'|q)
    DAPO         -min(r_t A_t, clip(r_t, 1 - eps_low, 1 + eps_high) A_t), r_t = pi'(y_t) / pi_old(y_t),
                 + kl_weight KL(pi'|q) - entropy_weight H(pi')
    DPO          -log sigmoid(beta (d(chosen) - d(rejected))), d(y) = sum_t log pi'(y_t) - log q(y_t)
    Distillation (1 - w) KL(p|pi') + w KL(pi'|p)

q is the frozen model, pi' the adapted policy, pi_old the one that sampled, p another, larger model that the layer is
to bring pi' nearer to; KL and entropy are exact, those to p too (see `divergence`). Base
log-probabilities are in the features, so DPO runs no reference model (arXiv 2305.18290).

Where DAPO (arXiv 2503.14476, on the tokens of arXiv 2506.01939) departs from TRL's GRPOTrainer with loss_type="dapo":

- the denominator is the number of selected tokens: TRL divides by all valid tokens, also where
  `top_entropy_quantile` selects a share rho of them, so that its loss is about rho times this one; at rho = 1 they
  are equal;
- KL: TRL estimates it from the sampled token, here it is exact.

Shapes: T tokens, A answers, N units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_bias.divergence import Divergences
from moe_bias.features.extract import Features
from moe_bias.mistakes import UserError
from moe_bias.plugins import Kind, resolve

EPS_LOW, EPS_HIGH = 0.2, 0.28
"""How far the ratio of new to old probability may go below and above 1 (DAPO, arXiv 2503.14476)."""

Unit = Literal["token", "answer", "pair"]


@dataclass(frozen=True)
class Distribution:
    """Of the whole distribution at each token, (T,), in nats: its entropy, and its exact KL to the frozen model."""

    entropy: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Now:
    """The layer's policy as it is: `log_prob` (T,) of the realised tokens, in nats, float32 or better.

    Gradients flow through `log_prob`, `entropy`, `kl`, `forward_kl` and `reverse_kl`, and through nothing else. All at
    the sampling temperature.
    """

    log_prob: Tensor
    distribution: Distribution | None = None
    divergences: Divergences | None = None

    @property
    def entropy(self) -> Tensor:
        """Of the whole distribution (T,), in nats. Raises UserError where the objective has no `needs_stats`."""
        return self._whole().entropy

    @property
    def kl(self) -> Tensor:
        """Exact KL(pi'|q) to the frozen model (T,), in nats. Raises UserError as `entropy` does."""
        return self._whole().kl

    @property
    def forward_kl(self) -> Tensor:
        """Exact KL(p|pi') from the target (T,), in nats. Raises UserError where the objective has no `needs_target`."""
        return self._from_target().forward

    @property
    def reverse_kl(self) -> Tensor:
        """Exact KL(pi'|p) to the target (T,), in nats. Raises UserError as `forward_kl` does."""
        return self._from_target().reverse

    def _from_target(self) -> Divergences:
        if self.divergences is None:
            raise UserError(
                "divergences from a target are there for an objective that says `needs_target = True` alone"
            )
        return self.divergences

    def _whole(self) -> Distribution:
        if self.distribution is None:
            raise UserError("entropy and KL are there for an objective that says `needs_stats = True` alone")
        return self.distribution


@dataclass(frozen=True)
class Sampled:
    """What is known of each token from when it was sampled, (T,): its log-probability, its sample's advantage."""

    log_prob: Tensor
    advantage: Tensor

    def at(self, index: Tensor | slice) -> Sampled:
        """The given tokens; a slice copies nothing."""
        return Sampled(self.log_prob[index], self.advantage[index])


@dataclass(frozen=True)
class Then:
    """What is known of the same tokens from before, without gradient: their features, and how they were sampled."""

    features: Features
    sampled: Sampled | None = None

    @property
    def base_log_prob(self) -> Tensor:
        """Log-probability under the frozen model q, (T,) float64, in nats."""
        return self.features.logit - self.features.log_partition

    @property
    def log_prob(self) -> Tensor:
        """Log-probability under the policy that sampled, (T,), in nats. Raises UserError in supervised training."""
        return self._sampled().log_prob

    @property
    def advantage(self) -> Tensor:
        """Of each token's sample, (T,). Raises UserError in supervised training."""
        return self._sampled().advantage

    @cached_property
    def answer(self) -> Tensor:
        """Which answer of the batch each token is of, (T,) int64 from 0: of pairs the chosen ones are even."""
        return self._answers[1]

    @property
    def answers(self) -> int:
        """How many answers the tokens are of."""
        return len(self._answers[0])

    def per_answer(self, value_T: Tensor) -> Tensor:
        """Sums over each answer's tokens, (A,) float64."""
        return value_T.new_zeros(self.answers, dtype=torch.float64).index_add(0, self.answer, value_T.double())

    def units(self, unit: Unit) -> int:
        """How many units the tokens are. Raises UserError on an answer without the other one of its pair."""
        if unit == "token":
            return len(self.features)
        if unit == "pair":
            check_pairs(self._answers[0])
        return self.answers // 2 if unit == "pair" else self.answers

    @cached_property
    def _answers(self) -> tuple[Tensor, Tensor]:
        example_A, answer_T = self.features.example.unique(return_inverse=True)
        return example_A, answer_T

    def _sampled(self) -> Sampled:
        if self.sampled is None:
            raise UserError("advantages and sampled log-probabilities are there in reinforcement learning alone")
        return self.sampled


@dataclass(frozen=True)
class Terms:
    """What an objective gives: the `loss` (N,) of each unit, and by name what else to write down of each, (N,)."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What to minimise. A subclass need only be called; it may be any object with these members.

    One that has no `needs_target` needs none.
    """

    @property
    def needs_stats(self) -> bool:
        """Whether it reads `now.entropy` or `now.kl`, which cost several times as much as `now.log_prob`."""
        return False

    @property
    def unit(self) -> Unit:
        """What its loss is a mean over; batches hold whole units. A pair is the examples 2i and 2i + 1."""
        return "token"

    @property
    def needs_target(self) -> bool:
        """Whether it reads `now.forward_kl` or `now.reverse_kl`, which are there in training towards a target alone."""
        return False

    def __call__(self, now: Now, then: Then) -> Terms:
        """The loss of each unit that the tokens are, differentiable in what `now` holds."""
        ...


@dataclass(frozen=True)
class Supervised(Objective):
    """The negative log-likelihood, and with a weight the exact KL to the frozen model. Metrics: `nll`, `kl`."""

    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        _refuse_outside("kl_weight", self.kl_weight, 0, math.inf)

    @property
    def needs_stats(self) -> bool:
        """Where KL has a weight."""
        return self.kl_weight != 0

    def __call__(self, now: Now, then: Then) -> Terms:
        """One loss a token; `kl` is 0 where it has no weight."""
        nll_T = -now.log_prob
        if not self.needs_stats:
            return Terms(nll_T, {"nll": nll_T, "kl": torch.zeros_like(nll_T)})
        return Terms(nll_T + self.kl_weight * now.kl, {"nll": nll_T, "kl": now.kl})


@dataclass(frozen=True)
class DAPO(Objective):
    """GRPO with DAPO's clipping, and with weights the exact KL to the frozen model and an entropy bonus.

    Metrics: `clipped`, the share of tokens whose gradient the clip takes away.
    """

    eps_low: float = EPS_LOW
    eps_high: float = EPS_HIGH
    kl_weight: float = 0.0
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.eps_low < 1 and 0 <= self.eps_high < math.inf):
            raise UserError(
                f"the clip range 1 - {self.eps_low} to 1 + {self.eps_high} must hold 1 and begin above 0:"
                " `eps_low` from 0 to below 1, `eps_high` from 0"
            )
        _refuse_outside("kl_weight", self.kl_weight, 0, math.inf)
        _refuse_outside("entropy_weight", self.entropy_weight, -math.inf, math.inf)

    @property
    def needs_stats(self) -> bool:
        """Where KL or entropy has a weight."""
        return self.kl_weight != 0 or self.entropy_weight != 0

    def __call__(self, now: Now, then: Then) -> Terms:
        """One loss a token."""
        bounds = self.eps_low, self.eps_high
        loss_T, clipped_T = clipped_policy_loss(now.log_prob, then.log_prob, then.advantage, *bounds)
        if self.needs_stats:
            loss_T = loss_T + self.kl_weight * now.kl - self.entropy_weight * now.entropy
        return Terms(loss_T, {"clipped": clipped_T})


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation (arXiv 2305.18290); examples 2i are chosen, 2i + 1 rejected.

    Metrics: `margin`, beta (d(chosen) - d(rejected)) in nats, and `preferred`, the share of pairs where it is above 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"`beta` = {self.beta}: it must be above 0 and finite")

    @property
    def unit(self) -> Unit:
        """A chosen answer and its rejected one."""
        return "pair"

    def __call__(self, now: Now, then: Then) -> Terms:
        """One loss a pair."""
        chosen_N, rejected_N = then.per_answer(now.log_prob - then.base_log_prob).view(-1, 2).unbind(-1)
        margin_N = self.beta * (chosen_N - rejected_N)
        return Terms(-F.logsigmoid(margin_N), {"margin": margin_N, "preferred": margin_N > 0})


@dataclass(frozen=True)
class Distillation(Objective):
    """The exact divergence from a target model over the whole vocabulary; `reverse` is the weight of KL(pi'|p) in it.

    The forward KL(p|pi') is that of distillation (arXiv 1503.02531) and covers what the target might say, the reverse
    one avoids what it would not. Metrics: `forward_kl` and `reverse_kl`, in nats per token.
    """

    reverse: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.reverse <= 1:
            raise UserError(f"`reverse` = {self.reverse}: it must be a weight from 0 to 1")

    @property
    def needs_target(self) -> bool:
        """Always."""
        return True

    def __call__(self, now: Now, then: Then) -> Terms:
        """One loss a token."""
        loss_T = (1 - self.reverse) * now.forward_kl + self.reverse * now.reverse_kl
        return Terms(loss_T, {"forward_kl": now.forward_kl, "reverse_kl": now.reverse_kl})


def clipped_policy_loss(
    log_prob_T: Tensor,
    old_log_prob_T: Tensor,
    advantage_T: Tensor,
    eps_low: float = EPS_LOW,
    eps_high: float = EPS_HIGH,
) -> tuple[Tensor, Tensor]:
    """`-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)` of each token (T,), and which of them are clipped, bool.

    The minimum is `A min(r, 1 + eps_high)` for A >= 0 and `A max(r, 1 - eps_low)` for A < 0. It is
    taken before the exponential: a ratio that overflows then gives no NaN where it is clipped.
    """
    log_ratio_T = log_prob_T - old_log_prob_T.detach()
    highest, lowest = math.log1p(eps_high), math.log1p(-eps_low)
    bounded_T = torch.where(advantage_T >= 0, log_ratio_T.clamp(max=highest), log_ratio_T.clamp(min=lowest))
    clipped_T = ((log_ratio_T > highest) & (advantage_T > 0)) | ((log_ratio_T < lowest) & (advantage_T < 0))
    return -advantage_T * bounded_T.exp(), clipped_T


def check_pairs(example_A: Tensor) -> None:
    """Raises UserError where the numbers (A,), ascending, of a batch's examples are not all 2i and 2i + 1."""
    alone = example_A[~torch.isin(example_A ^ 1, example_A)].tolist()
    if alone:
        raise UserError(
            f"example {alone[0]} is without the other one of its pair, example {alone[0] ^ 1}; an objective of pairs "
            "needs the chosen answers as examples 0, 2, 4, ... and after each the rejected one"
        )


def check_terms(terms: Terms, units: int, objective: Objective) -> None:
    """Raises UserError where loss or metrics of an objective are not one number for each unit."""
    if not isinstance(terms, Terms):
        raise UserError(f"objective {name_of(objective)} gave {type(terms).__name__}, not Terms(loss, metrics)")
    for name, value in {"the loss": terms.loss, **terms.metrics}.items():
        if not isinstance(value, Tensor) or value.shape != (units,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"objective {name_of(objective)}: {name} has shape {shape}, not ({units},), one number for each "
                f"{objective.unit}; it is divided by their number outside"
            )


def wants_target(objective: Objective) -> bool:
    """Whether an objective reads divergences from a target model."""
    return bool(getattr(objective, "needs_target", False))


def name_of(objective: object) -> str:
    """As a sentence names it."""
    return getattr(objective, "__name__", type(objective).__name__)


def _refuse_outside(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        bound = "a finite number" if low == -math.inf else f"finite and at least {low:g}"
        raise UserError(f"`{name}` = {value}: it must be {bound}")


OBJECTIVES = Kind("objective", {"supervised": Supervised, "dapo": DAPO, "dpo": DPO})


def make_objective(given: str | Objective | type[Objective] | None) -> Objective | None:
    """An objective by object, by class, by `module:name`, or by the name of one that is built in or installed.

    None stays: whoever trains has one of its own. Raises UserError where there is no such objective.
    """
    found = None if given is None else resolve(OBJECTIVES, given)
    return found() if isinstance(found, type) else found
