"""The loop of supervised training: batches, steps, evaluations, checkpoints, and going on where one stopped.

Batches are of tokens, not of sequences: a hidden state holds all the context that the layer sees.
All that a step does follows from the layer, the optimiser's moments, the seed and the step's number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_bias.backbone import Head
from moe_bias.config import SFTConfig
from moe_bias.features.extract import Features
from moe_bias.features.source import FeatureSource, on_device
from moe_bias.interrupts import deferred_interrupt
from moe_bias.layer import MoEBiasLayer
from moe_bias.limits import refuse_endless_steps
from moe_bias.mistakes import UserError
from moe_bias.progress import Meter, meter
from moe_bias.training.base_logits import BaseLogits
from moe_bias.training.checkpoint import LAYER, Checkpoints, Position
from moe_bias.training.metrics import Metrics, MetricsLog, step_metrics
from moe_bias.training.objective import SupervisedLoss, mean_nll, supervised_gradients
from moe_bias.training.optimisation import GradientNorms, Optimisation, dropped_experts
from moe_bias.training.processes import ALONE, Processes

_BEST = "best."


@dataclass(frozen=True)
class Evaluations:
    """Held-out tokens that are looked at every `every` steps (0: once an epoch).

    After `patience` evaluations without a better NLL the run stops, and the best layer is what it
    ends with; 0: it never does.
    """

    source: FeatureSource
    every: int = 0
    patience: int = 0


@dataclass(frozen=True)
class FitReport:
    """Steps taken; with evaluations, the step that the layer is of and its held-out NLL in nats per token."""

    steps: int
    layer_step: int
    held_out_nll: float | None


@dataclass(frozen=True)
class Watch:
    """What goes on beside the steps: evaluations, a log of metrics, checkpoints; each may be left out."""

    evaluations: Evaluations | None = None
    checkpoints: Checkpoints | None = None
    log: MetricsLog | None = None


class Trainer:
    """One run over one source. The layer is trained in place, on the head's device."""

    def __init__(
        self,
        layer: MoEBiasLayer,
        source: FeatureSource,
        head: Head,
        settings: SFTConfig,
        watch: Watch,
        processes: Processes = ALONE,
        logits: BaseLogits | None = None,
    ) -> None:
        """`logits` of the source, where there are such already, are used in place of new ones."""
        self._layer = layer.to(head.device)
        self._source = source
        self._transform = head.transform
        self._settings = settings
        self._watch = watch
        self._processes = processes
        self._steps_per_epoch = -(-len(source) // settings.batch_tokens)
        refuse_endless(settings, len(source))
        self._steps = settings.epochs * self._steps_per_epoch
        self._optimisation = Optimisation(layer, settings, self._steps)
        self._logits = logits or BaseLogits(source, head, settings.logits_budget)
        if watch.evaluations is not None:
            left = settings.logits_budget - self._logits.nbytes
            self._held_out_logits = BaseLogits(watch.evaluations.source, head, left)
        self._position = Position()
        self._best: dict[str, Tensor] = {}

    def resume(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Takes up what a checkpoint holds."""
        self._layer.load_state_dict(_without_prefix(tensors, LAYER))
        self._optimisation.load_tensors(tensors)
        self._best = _without_prefix(tensors, _BEST)
        self._position = position

    def run(self, description: str) -> FitReport:
        """Trains to the end.

        Raises UserError where the loss or a gradient is not finite, or the loss above its bound; the
        layer then holds the weights of the step before. Raises KeyboardInterrupt on Ctrl-C, after a
        checkpoint where there are any.
        """
        tokens, done = self._settings.epochs * len(self._source), self._position.step
        with meter(description, tokens, "tokens", self._processes.is_first) as bar, deferred_interrupt() as pressed:
            bar.advance(tokens * done / self._steps)
            if done == 0 and self._watch.evaluations is not None:
                self._write({"held_out_nll": self._evaluate()})
            for index in batches(len(self._source), self._settings, done):
                if self._out_of_patience():
                    break
                if self._processes.any(pressed()):
                    self._save()
                    raise KeyboardInterrupt
                self._advance(index, bar)
        return self._finish()

    def _advance(self, index: Tensor, bar: Meter) -> None:
        """A step and what follows it, in the order that a resumed run relies on: evaluation, log, checkpoint."""
        started = time.perf_counter()
        metrics = self._step(index)
        metrics["tokens"] = len(index)
        metrics["tokens_per_second"] = len(index) / (time.perf_counter() - started)
        self._position = replace(self._position, step=self._position.step + 1)
        if self._evaluation_is_due():
            metrics["held_out_nll"] = self._evaluate()
        self._write(metrics)
        checkpoints = self._watch.checkpoints
        if checkpoints is not None and self._position.step % checkpoints.every == 0:
            self._save()
        bar.advance(len(index))
        held_out = self._position.last_nll
        bar.note(f"loss {metrics['nll']:.3f}" + ("" if held_out is None else f", held-out {held_out:.3f}"))

    def _step(self, index: Tensor) -> Metrics:
        step, layer = self._position.step, self._layer
        part = self._processes.part(index)
        batch = on_device(self._source.at(part), layer.device)
        self._optimisation.zero_grad()
        with dropped_experts(layer, self._settings.expert_dropout, self._settings.seed, step):
            logits_of = self._logits.of(part, batch)
            loss = supervised_gradients(
                layer, batch, logits_of, self._transform, self._processes.total, self._settings.kl_weight
            )
        self._processes.total_gradients(layer)
        norms = self._optimisation.norms()
        self._check(batch, loss, norms)
        self._optimisation.step(step)
        return step_metrics(layer, loss, norms, self._optimisation.rates(step), self._processes)

    def _check(self, batch: Features, loss: SupervisedLoss, norms: GradientNorms) -> None:
        """Raises UserError before a step that would spoil the layer."""
        cause = _cause(batch, loss, norms, self._settings, self._settings.rates_of(self._layer.config.experts))
        if cause is None:
            return
        message = f"training stopped at step {self._position.step + 1} of {self._steps}: {cause}"
        checkpoints = self._watch.checkpoints
        if checkpoints is not None:
            path = checkpoints.latest()
            message += "; there is no checkpoint yet" if path is None else f"; the last good checkpoint is {path}"
        raise UserError(message)

    def _evaluation_is_due(self) -> bool:
        if self._watch.evaluations is None:
            return False
        every = self._watch.evaluations.every or self._steps_per_epoch
        return self._position.step % every == 0 or self._position.step == self._steps

    def _evaluate(self) -> float:
        """The held-out NLL now; remembers the layer where it is the best yet and the best is wanted."""
        assert self._watch.evaluations is not None
        nll = mean_nll(
            self._layer, self._watch.evaluations.source, self._held_out_logits, self._transform, self._processes
        )
        position = replace(self._position, last_nll=nll)
        if position.best_nll is not None and nll >= position.best_nll:
            self._position = replace(position, worse=position.worse + 1)
            return nll
        self._position = replace(position, best_nll=nll, best_step=position.step, worse=0)
        if self._watch.evaluations.patience:
            self._best = {name: tensor.clone() for name, tensor in self._layer.state_dict().items()}
        return nll

    def _out_of_patience(self) -> bool:
        evaluations = self._watch.evaluations
        return evaluations is not None and 0 < evaluations.patience <= self._position.worse

    def _finish(self) -> FitReport:
        """Puts the best layer in place where one was looked for."""
        position = self._position
        if not self._best:
            return FitReport(position.step, position.step, position.last_nll)
        self._layer.load_state_dict(self._best)
        return FitReport(position.step, position.best_step, position.best_nll)

    def _write(self, metrics: Metrics) -> None:
        if self._watch.log is not None:
            self._watch.log.write(self._position.step, metrics)

    def _save(self) -> None:
        checkpoints = self._watch.checkpoints
        if checkpoints is None:
            return
        if self._processes.is_first:
            tensors = _with_prefix(self._layer.state_dict(), LAYER) | _with_prefix(self._best, _BEST)
            checkpoints.save(tensors | self._optimisation.tensors(), self._position)
        self._processes.wait()


def refuse_endless(settings: SFTConfig, tokens: int) -> None:
    """Raises UserError where training on so many tokens takes more steps than anyone waits for."""
    steps = settings.epochs * -(-tokens // settings.batch_tokens)
    what = f"{settings.epochs:,} epochs over {tokens:,} tokens, {settings.batch_tokens:,} in a step,"
    refuse_endless_steps(steps, what, "lower --epochs, or raise --batch-tokens")


def batches(tokens: int, settings: SFTConfig, first_step: int = 0) -> Iterator[Tensor]:
    """Token numbers of each batch from step `first_step` on: every epoch all tokens in a new random order."""
    generator = torch.Generator().manual_seed(settings.seed)
    steps_per_epoch = -(-tokens // settings.batch_tokens)
    for epoch in range(settings.epochs):
        # Orders of epochs that are over are drawn too: they are what the generator's state consists of.
        order = torch.randperm(tokens, generator=generator)
        yield from order.split(settings.batch_tokens)[max(first_step - epoch * steps_per_epoch, 0) :]


def _cause(
    batch: Features, loss: SupervisedLoss, norms: GradientNorms, settings: SFTConfig, rates: tuple[float, float]
) -> str | None:
    """Why no step can be taken with this loss and these gradients, and what to do; None where it can."""
    value = float(loss.total)
    slower = f"lower --expert-rate ({rates[0]:g}) or --router-rate ({rates[1]:g})"
    if not math.isfinite(value) and not _is_finite(batch):
        return "its hidden states, logits or entropies are not finite; extract them again, in a wider type"
    if not math.isfinite(value):
        return f"the loss became {value}; {slower}"
    if value > settings.loss_bound:
        return f"the loss {value:.4g} is above --loss-bound {settings.loss_bound:g}; {slower}"
    if not math.isfinite(norms.total):
        return f"the norm of the gradients became {norms.total}; {slower}"
    return None


def _is_finite(batch: Features) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in (batch.hidden, batch.logit, batch.entropy))


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
