"""Supervised training on hidden states: batches, steps, held-out evaluations, early stopping.

The loop is that of `loop`, the loss any objective that needs no samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import SFTConfig
from moe_bias.features.adapted import LogitsOf
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.extract import Features
from moe_bias.features.source import FeatureSource, on_device
from moe_bias.features.target import target_of
from moe_bias.layer import MoEBiasLayer
from moe_bias.limits import refuse_endless_steps
from moe_bias.mistakes import UserError
from moe_bias.progress import Meter
from moe_bias.training.batches import Units, batches
from moe_bias.training.checkpoint import Position
from moe_bias.training.gradients import Loss, gradients, mean_loss
from moe_bias.training.held_out import mean_nll
from moe_bias.training.loop import NOTHING_ELSE, Loop, Watching, with_prefix, without_prefix
from moe_bias.training.metrics import Metrics, step_metrics
from moe_bias.training.objective_trial import check_objective
from moe_bias.training.objectives import Objective, Supervised, wants_target
from moe_bias.training.optimisation import GradientNorms, Optimisation, dropped_experts
from moe_bias.training.processes import ALONE, Processes

_BEST = "best."


@dataclass(frozen=True)
class FitReport:
    """Steps taken; with evaluations, the step that the layer is of and its held-out NLL in nats per token.

    Of an objective of answers or pairs, or towards a target, it is the held-out loss.
    """

    steps: int
    layer_step: int
    held_out_nll: float | None


class Trainer(Loop[Position]):
    """One run over one source. The layer is trained in place, on the head's device."""

    def __init__(
        self,
        layer: MoEBiasLayer,
        source: FeatureSource,
        head: Head,
        settings: SFTConfig,
        watching: Watching = NOTHING_ELSE,
        processes: Processes = ALONE,
        logits: BaseLogits | None = None,
        objective: Objective | None = None,
        held_out: FeatureSource | None = None,
        target: Head | None = None,
    ) -> None:
        """`logits` of the source, where there are such already, are used in place of new ones.

        On `held_out` tokens the layer is measured, where `watching` has no measure of its own, of which less is
        better. `target` is the head of the model whose hidden states the tokens have beside them. Raises UserError on
        an objective that cannot be used with the source.
        """
        self._source = source
        self._head = head
        self._settings = settings
        self._objective = objective_of(settings, objective, with_target=target is not None)
        self._units = units_of(source, self._objective)
        refuse_endless(settings, len(source))
        self._in_a_batch = self._units.in_a_batch(settings.batch_tokens)
        per_epoch = -(-self._units.count // self._in_a_batch)
        self._logits = logits or BaseLogits(source, head, settings.logits_budget)
        self._of_target = target_logits(source, target, settings.logits_budget - self._logits.nbytes)
        if held_out is not None and watching.evaluate is None:
            kept = [self._logits, *([self._of_target] if self._of_target else [])]
            budget = settings.logits_budget - sum(logits.nbytes for logits in kept)
            left = BaseLogits(held_out, head, budget)
            of_target = target_logits(held_out, target, budget - left.nbytes)
            measured = HeldOut(held_out, head, left, self._objective, settings, processes, of_target)
            watching = replace(watching, evaluate=measured)
        self.measure = "held_out_nll" if measures_nll(self._objective) else "held_out_loss"
        steps, layer = settings.epochs * per_epoch, layer.to(head.device)
        optimisation = Optimisation(layer, settings, steps)
        super().__init__(layer, optimisation, watching, Position(), steps, per_epoch, processes)
        self._best: dict[str, Tensor] = {}

    def resume(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Takes up what a checkpoint holds."""
        super().resume(tensors, position)
        self._best = without_prefix(tensors, _BEST)

    def run(self, description: str) -> FitReport:
        """Trains to the end.

        Raises UserError where the loss or a gradient is not finite, or the loss above its bound; the
        layer then holds the weights of the step before. Raises KeyboardInterrupt on Ctrl-C, after a
        checkpoint where there are any.
        """
        tokens, done = self._settings.epochs * len(self._source), self._position.step
        self._batches = batches(self._units.count, self._in_a_batch, self._settings.epochs, self._settings.seed, done)
        self._loop(description, tokens, "tokens", tokens * done / self._steps)
        return self._finish()

    def _step(self, bar: Meter) -> Metrics:
        started, unit_N = time.perf_counter(), next(self._batches)
        metrics = self._learn(unit_N)
        metrics["tokens"] = len(self._units.tokens_of(unit_N))
        metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - started)
        self._position = replace(self._position, step=self._position.step + 1)
        return metrics

    def _learn(self, unit_N: Tensor) -> Metrics:
        step, layer = self._position.step, self._layer
        part = self._units.tokens_of(self._processes.part(unit_N))
        batch = on_device(self._source.at(part), layer.device)
        if self._objective.unit != "token":
            _refuse_partial(batch)
        self._optimisation.zero_grad()
        with dropped_experts(layer, self._settings.expert_dropout, self._settings.seed, step):
            loss = gradients(
                layer,
                batch,
                self._logits.of(part, batch),
                self._head.transform,
                self._objective,
                total=self._processes.total,
                target_of=logits_of(self._of_target, part, batch),
            )
        self._processes.total_gradients(layer)
        norms = self._optimisation.norms()
        self._check(batch, loss, norms)
        self._optimisation.step(step)
        return step_metrics(layer, loss, norms, self._optimisation.rates(step), self._processes)

    def _check(self, batch: Features, loss: Loss, norms: GradientNorms) -> None:
        """Raises UserError before a step that would spoil the layer."""
        cause = _cause(batch, loss, norms, self._settings, self._settings.rates_of(self._layer.config.experts))
        if cause is None:
            return
        message = f"training stopped at step {self._position.step + 1} of {self._steps}: {cause}"
        checkpoints = self._watching.checkpoints
        if checkpoints is not None:
            path = checkpoints.latest()
            message += "; there is no checkpoint yet" if path is None else f"; the last good checkpoint is {path}"
        raise UserError(message)

    def _note(self, values: Mapping[str, float], bar: Meter) -> None:
        """Remembers the layer where it is the best yet and the best is wanted."""
        value = values[self.measure]
        position = replace(self._position, last_nll=value)
        if position.best_nll is not None and value >= position.best_nll:
            self._position = replace(position, worse=position.worse + 1)
            return
        self._position = replace(position, best_nll=value, best_step=position.step, worse=0)
        if self._watching.patience:
            self._best = {name: tensor.clone() for name, tensor in self._layer.state_dict().items()}

    def _end(self, metrics: Metrics, bar: Meter) -> None:
        bar.advance(metrics["tokens"])
        held_out = self._position.last_nll
        loss = metrics.get("nll", metrics["loss"])
        bar.note(f"loss {loss:.3f}" + ("" if held_out is None else f", held-out {held_out:.3f}"))

    def _goes_on(self) -> bool:
        return super()._goes_on() and not 0 < self._watching.patience <= self._position.worse

    def _finish(self) -> FitReport:
        """Puts the best layer in place where one was looked for."""
        position = self._position
        if not self._best:
            return FitReport(position.step, position.step, position.last_nll)
        self._layer.load_state_dict(self._best)
        return FitReport(position.step, position.best_step, position.best_nll)

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | with_prefix(self._best, _BEST)


@dataclass(frozen=True)
class HeldOut:
    """Measures a layer on held-out tokens, whose base logits are kept where they fit: its NLL in nats per token.

    For an objective of answers or pairs, or towards a target, it is the objective's mean loss.
    """

    source: FeatureSource
    head: Head
    logits: BaseLogits
    objective: Objective
    settings: SFTConfig
    processes: Processes = ALONE
    of_target: BaseLogits | None = None

    def __call__(self, layer: MoEBiasLayer) -> float:
        """All processes take part."""
        if measures_nll(self.objective):
            return mean_nll(layer, self.source, self.logits, self.head.transform, self.processes)
        units = units_of(self.source, self.objective)
        total, in_a_batch = (
            torch.zeros((), dtype=torch.float64, device=layer.device),
            units.in_a_batch(self.settings.batch_tokens),
        )
        for unit_N in torch.arange(units.count).split(in_a_batch)[self.processes.rank :: self.processes.count]:
            index = units.tokens_of(unit_N)
            batch = on_device(self.source.at(index), layer.device)
            loss = mean_loss(
                layer,
                batch,
                self.logits.of(index, batch),
                self.head.transform,
                self.objective,
                logits_of(self.of_target, index, batch),
            )
            total += len(unit_N) * loss
        return float(self.processes.total(total)) / units.count


def measures_nll(objective: Objective) -> bool:
    """Whether held-out tokens are measured by their likelihood, and not by the objective."""
    return objective.unit == "token" and not wants_target(objective)


def target_logits(source: FeatureSource, target: Head | None, budget: int) -> BaseLogits | None:
    """The target's logits on the support, kept where they fit into so many bytes; None without a target."""
    return None if target is None else BaseLogits(source, target, budget, lambda batch: target_of(batch).hidden)


def logits_of(logits: BaseLogits | None, index: Tensor, batch: Features) -> LogitsOf | None:
    """Those of a batch that holds the source's tokens `index`."""
    return None if logits is None else logits.of(index, batch)


def objective_of(settings: SFTConfig, objective: Objective | None, with_target: bool = False) -> Objective:
    """The objective given, or that of the settings. Raises UserError on one that supervised training cannot use."""
    if objective is None:
        return Supervised(settings.kl_weight)
    if settings.kl_weight:
        raise UserError(f"`kl_weight` = {settings.kl_weight:g} is of the usual objective; give it to your own")
    check_objective(objective, with_samples=False, with_target=with_target)
    return objective


def units_of(source: FeatureSource, objective: Objective) -> Units:
    """What an objective's loss is a mean over. Raises UserError on an answer without the other one of its pair."""
    return Units(len(source)) if objective.unit == "token" else Units.of(source.example, objective.unit)


def refuse_endless(settings: SFTConfig, tokens: int) -> None:
    """Raises UserError where training on so many tokens takes more steps than anyone waits for."""
    steps = settings.epochs * -(-tokens // settings.batch_tokens)
    what = f"{settings.epochs:,} epochs over {tokens:,} tokens, {settings.batch_tokens:,} in a step,"
    refuse_endless_steps(steps, what, "lower `epochs`, or raise `batch_tokens`")


def _refuse_partial(batch: Features) -> None:
    """Raises UserError where not all tokens of an answer are there: its log-probability would be of a part."""
    example_A, answer_T, there_A = batch.example.unique(return_inverse=True, return_counts=True)
    all_A = there_A.new_zeros(len(there_A)).scatter_reduce(0, answer_T, batch.position + 1, "amax")
    for example, there, whole in zip(example_A.tolist(), there_A.tolist(), all_A.tolist(), strict=True):
        if there != whole:
            raise UserError(
                f"{there} of the {whole} tokens of example {example} are there; an objective of answers needs all of "
                "them: extract without `keep_top`"
            )


def _cause(
    batch: Features, loss: Loss, norms: GradientNorms, settings: SFTConfig, rates: tuple[float, float]
) -> str | None:
    """Why no step can be taken with this loss and these gradients, and what to do; None where it can."""
    value = float(loss.total)
    slower = f"lower `expert_rate` ({rates[0]:g}) or `router_rate` ({rates[1]:g})"
    if not math.isfinite(value) and not _is_finite(batch):
        return "its hidden states, logits or entropies are not finite; extract them again, in a wider type"
    if not math.isfinite(value):
        return f"the loss became {value}; {slower}"
    if value > settings.loss_bound:
        return f"the loss {value:.4g} is above `loss_bound` {settings.loss_bound:g}; {slower}"
    if not math.isfinite(norms.total):
        return f"the norm of the gradients became {norms.total}; {slower}"
    return None


def _is_finite(batch: Features) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in (batch.hidden, batch.logit, batch.entropy))
