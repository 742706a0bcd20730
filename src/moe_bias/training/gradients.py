"""The gradient of any objective on features, written out, a chunk of tokens at a time.

Memory for what is as wide as the support is used again, and does not grow with the batch. An objective sees numbers of
each token alone (`objectives`), so that its own gradient, taken by autograd, is a weight or three for each token;
what follows from there to the layer's coefficients and table is the same for all of them. Where the unit is a token a
chunk is done with at once. Where it is more, one pass over the chunks finds the numbers of all tokens, and a second
one takes the gradient with their weights: as exact, with the support's columns read twice.

Autograd takes the gradient on from coefficients and table to the parameters, once a step. Over several processes, each
with a part of the batch's units, the loss is still that of the whole batch: the number of units and the routed
shares f_e of the load-balance loss (arXiv 2101.03961) are summed over the processes.

Shapes: T tokens, C coefficients, M support.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.backbone import HeadTransform
from moe_bias.divergence import Divergences, Draft, divergences_and_gradient
from moe_bias.features.adapted import Adapted, LogitsOf, chunks
from moe_bias.features.extract import Features
from moe_bias.features.target import target_of as target_tokens
from moe_bias.layer import MoEBiasLayer, Routing, itself, load_balance_loss
from moe_bias.support import log_prob_and_gradient, reduced_stats
from moe_bias.training.objectives import Distribution, Now, Objective, Sampled, Then, check_terms


@dataclass(frozen=True)
class Loss:
    """`total` to minimise: the objective's mean over `units` and the weighted `load_balance`, which is unweighted here.

    `metrics` are means over the units too. `log_prob` (T,) and `routing` are of the tokens given, in this process.
    """

    total: Tensor
    load_balance: Tensor
    units: Tensor
    metrics: dict[str, Tensor]
    log_prob: Tensor
    routing: Routing


def plain_loss(
    objective: Objective, adapted: Adapted, then: Then, load_balance_weight: float, selected_T: Tensor | None = None
) -> Loss:
    """The plain reference of `gradients`: the loss with its graph, over the selected tokens (T,) bool (None: all).

    0 without any. The others may hold anything.
    """
    if selected_T is None:
        selected_T = torch.ones_like(adapted.log_prob, dtype=torch.bool)
    stats = adapted.stats
    whole = None if stats is None else Distribution(stats.entropy[selected_T], stats.kl[selected_T])
    sampled = None if then.sampled is None else then.sampled.at(selected_T)
    then = Then(then.features.at(selected_T), sampled)
    units = adapted.log_prob.new_tensor(float(then.units(objective.unit)))
    terms = objective(Now(adapted.log_prob[selected_T], whole), then)
    check_terms(terms, int(units), objective)
    means = {name: value.sum() / units.clamp(min=1) for name, value in terms.metrics.items()}
    balance = load_balance_loss(adapted.routing, selected_T)
    total = terms.loss.sum() / units.clamp(min=1) + load_balance_weight * balance
    return Loss(total, balance, units, means, adapted.log_prob, adapted.routing)


def gradients(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: LogitsOf,
    transform: HeadTransform,
    objective: Objective,
    sampled: Sampled | None = None,
    temperature: float = 1.0,
    total: Callable[[Tensor], Tensor] = itself,
    target_of: LogitsOf | None = None,
) -> Loss:
    """Adds the gradient of the objective to the layer's parameters; returns the loss without graph.

    `batch` and `sampled` hold the tokens of the loss alone: no time is spent on others. `logits_of` gives a tensor
    of its own each time, and so does `target_of` the target's logits, for an objective that needs a target. `total`
    sums a tensor over the processes that share the batch: the loss returned is the whole batch's, the gradient this
    process's summand of it. Raises UserError where an answer is without the other of its pair, and where the objective
    does not give one loss a unit.
    """
    mixture = layer.mix(batch.hidden, batch.entropy)
    table_CM = layer.table().to(mixture.coefficients.dtype)
    then = Then(batch, sampled)
    units = total(table_CM.new_tensor(float(then.units(objective.unit))))
    policy = _Policy(
        mixture.coefficients.detach(),
        table_CM.detach(),
        transform,
        temperature,
        layer.strength,
        with_stats=objective.needs_stats,
        target_of=target_of,
    )
    weigher = _Weigher(objective, units.clamp(min=1), policy.now)
    parts = chunks(len(batch), table_CM)
    if objective.unit == "token" or len(parts) == 1:
        for rows in parts:
            at_once = then if len(parts) == 1 else _then_at(then, rows)
            policy.add(rows, batch.at(rows), logits_of(rows), weigher.weights_in(at_once))
    else:
        weights = weigher.weights(then, policy.numbers_of(batch, logits_of))
        for rows in parts:
            of_rows = [weight_T[rows] for weight_T in weights]
            policy.add(rows, batch.at(rows), logits_of(rows), _known(of_rows))
    balance, weight = load_balance_loss(mixture.routing, total=total), layer.config.load_balance_weight
    backward((mixture.coefficients, policy.coefficients_TC), (table_CM, policy.table_CM), (weight * balance, None))
    sums, balance = {name: total(value) for name, value in weigher.sums.items()}, total(balance.detach())
    loss = sums.pop(_LOSS) + weight * balance
    routing = Routing(mixture.routing.probs.detach(), mixture.routing.gates.detach())
    return Loss(loss, balance, units, sums, torch.cat(weigher.log_probs), routing)


@torch.no_grad()
def mean_loss(
    layer: MoEBiasLayer,
    batch: Features,
    logits_of: LogitsOf,
    transform: HeadTransform,
    objective: Objective,
    target_of: LogitsOf | None = None,
) -> float:
    """The mean of a batch's losses, in supervised training; without the load balance, and without gradient."""
    coefficients_TC = layer.mix(batch.hidden, batch.entropy).coefficients
    table_CM, then = layer.table().to(coefficients_TC.dtype), Then(batch)
    policy = _Policy(coefficients_TC, table_CM, transform, 1.0, layer.strength, objective.needs_stats, target_of)
    terms = objective(policy.now(policy.numbers_of(batch, logits_of)), then)
    check_terms(terms, then.units(objective.unit), objective)
    return float(terms.loss.double().mean())


def backward(*roots: tuple[Tensor, Tensor | None]) -> None:
    """Runs back from tensors with their gradients (None: of a scalar, 1), those that depend on a parameter.

    Without a router the balance does not, and the coefficients of one free expert without a gate are constant.
    """
    trained = [(root, gradient) for root, gradient in roots if root.requires_grad]
    torch.autograd.backward([root for root, _ in trained], [gradient for _, gradient in trained])


_LOSS = ""
"""The loss beside the metrics, whose names are not empty."""
Weigh = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From what a policy says of tokens, (T,) each, to the gradient of the loss by it, (T,) each."""


def _known(weights: Sequence[Tensor]) -> Weigh:
    return lambda _: weights


class _Weigher:
    """Asks an objective for the gradient by each token's numbers, and keeps sums of loss and metrics over `units`."""

    def __init__(self, objective: Objective, units: Tensor, now: Callable[[Sequence[Tensor]], Now]) -> None:
        self._objective, self._units, self._now = objective, units, now
        self.sums: dict[str, Tensor] = {}
        self.log_probs: list[Tensor] = []

    def weights_in(self, then: Then) -> Weigh:
        """`weights` of tokens of which that is known."""
        return lambda numbers: self.weights(then, numbers)

    def weights(self, then: Then, numbers: Sequence[Tensor]) -> Sequence[Tensor]:
        """By log-probability, and by entropy, KL and the divergences from a target where they are among the numbers."""
        leaves = [number.detach().requires_grad_() for number in numbers]
        with torch.enable_grad():
            terms = self._objective(self._now(leaves), then)
            check_terms(terms, then.units(self._objective.unit), self._objective)
            loss = terms.loss.sum() / self._units
            weights = torch.autograd.grad(loss, leaves, materialize_grads=True)
        self._add(_LOSS, loss)
        for name, value in terms.metrics.items():
            self._add(name, value.detach().sum() / self._units)
        self.log_probs.append(numbers[0].detach())
        return weights

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().to(self._units.dtype)
        self.sums[name] = self.sums[name] + value if name in self.sums else value


class _Policy:
    """The policy of coefficients (T, C) and a table (C, M); gathers the gradient by both.

    Written out, and in place: autograd would copy what is as wide as the support at every turn. Only entropy and KL,
    whose gradients need float64 in places, and a soft-cap are left to it.
    """

    def __init__(
        self,
        coefficients_TC: Tensor,
        table_CM: Tensor,
        transform: HeadTransform,
        temperature: float,
        strength: float,
        with_stats: bool,
        target_of: LogitsOf | None = None,
    ) -> None:
        self._coefficients_TC, self._table_CM, self._transform = coefficients_TC, table_CM, transform
        self._temperature, self._with_stats, self._target_of = temperature, with_stats, target_of
        self._is_plain = transform.cap is None and not with_stats
        self._scale = strength / temperature if self._is_plain else strength
        self.coefficients_TC, self.table_CM = torch.zeros_like(coefficients_TC), torch.zeros_like(table_CM)

    @torch.no_grad()
    def numbers_of(self, batch: Features, logits_of: LogitsOf) -> list[Tensor]:
        """Of each token (T,): its log-probability, entropy and KL where they are wanted, divergences from a target."""
        parts = []
        for rows in chunks(len(batch), self._table_CM):
            coefficients_TC = self._scale * self._coefficients_TC[rows]
            numbers, _ = self._seen(coefficients_TC, batch.at(rows), logits_of(rows), rows)
            parts.append([number.detach() for number in numbers])
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    @torch.no_grad()
    def add(self, rows: slice, batch: Features, logits_TM: Tensor, weigh: Weigh) -> None:
        """Adds the gradient of a chunk, whose weights are asked for."""
        coefficients_TC, table_CM = self._scale * self._coefficients_TC[rows], self._table_CM
        numbers, gradient_of = self._seen(coefficients_TC, batch, logits_TM, rows)
        gradient_TM = gradient_of(weigh(numbers))
        torch.mm(gradient_TM, table_CM.T, out=self.coefficients_TC[rows]).mul_(self._scale)
        self.table_CM.addmm_(coefficients_TC.T, gradient_TM)

    def now(self, numbers: Sequence[Tensor]) -> Now:
        """The numbers of tokens as an objective sees them."""
        whole = Distribution(numbers[1], numbers[2]) if self._with_stats else None
        return Now(numbers[0], whole, None if self._target_of is None else Divergences(*numbers[-2:]))

    def _seen(
        self, coefficients_TC: Tensor, batch: Features, logits_TM: Tensor, rows: slice
    ) -> tuple[Sequence[Tensor], Callable[[Sequence[Tensor]], Tensor]]:
        """The tokens' numbers, and what makes weights of them the gradient (T, M) that `add` multiplies.

        `rows` are those of the tokens in the whole batch.
        """
        if self._is_plain:
            logits_TM.addmm_(coefficients_TC, self._table_CM)
            return self._of_adapted(batch, logits_TM, rows)
        bias_TM = (coefficients_TC @ self._table_CM).requires_grad_()
        with torch.enable_grad():
            move_TM = self._reachable(logits_TM, bias_TM)
        numbers, gradient_of = self._of_adapted(batch, logits_TM + move_TM.detach(), rows)
        if not self._with_stats:
            return numbers, lambda weights: torch.autograd.grad(move_TM, bias_TM, gradient_of(weights))[0]
        with torch.enable_grad():
            stats = reduced_stats(logits_TM, move_TM, batch.rest)
        outputs = [move_TM, stats.entropy, stats.kl]

        def gradient_with_stats(weights: Sequence[Tensor]) -> Tensor:
            of_adapted = gradient_of([weights[0], *weights[3:]])
            return torch.autograd.grad(outputs, bias_TM, [of_adapted, *weights[1:3]])[0]

        return [numbers[0], stats.entropy, stats.kl, *numbers[1:]], gradient_with_stats

    def _of_adapted(
        self, batch: Features, adapted_TM: Tensor, rows: slice
    ) -> tuple[Sequence[Tensor], Callable[[Sequence[Tensor]], Tensor]]:
        """The numbers that follow from `u + d`, which is overwritten, and what makes weights of them its gradient."""
        if self._target_of is not None:
            draft = Draft(batch.logit, batch.column, batch.rest, batch.log_partition)
            return divergences_and_gradient(adapted_TM, draft, self._target_of(rows), target_tokens(batch).scalars)
        log_prob_T, gradient_of = log_prob_and_gradient(batch.logit, batch.column, adapted_TM, batch.rest)
        return [log_prob_T], lambda weights: gradient_of(weights[0])

    def _reachable(self, logits_TM: Tensor, bias_TM: Tensor) -> Tensor:
        """`d` of a bias at the temperature, over which the logits are given."""
        if self._temperature == 1:
            return self._transform.reachable(logits_TM, bias_TM)
        return self._transform.reachable(self._temperature * logits_TM, bias_TM) / self._temperature


def _then_at(then: Then, rows: slice) -> Then:
    return Then(then.features.at(rows), None if then.sampled is None else then.sampled.at(rows))
