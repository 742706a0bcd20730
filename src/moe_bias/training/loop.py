"""The loop of any training: steps, and what goes on beside them in the order that a resumed run relies on.

After each step: an evaluation where one is due, the step's line of metrics, a checkpoint where one is due, callbacks.
All that a step does follows from the layer, the optimiser's moments, the seed and the step's number, so that a run
that was killed does the interrupted step again, to the same bytes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

from torch import Tensor

from moe_bias.interrupts import deferred_interrupt
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import Meter, meter
from moe_bias.training.checkpoint import LAYER, Checkpoints, Where
from moe_bias.training.metrics import Metrics, SampleLog
from moe_bias.training.optimisation import Optimisation
from moe_bias.training.processes import ALONE, Processes

Evaluate = Callable[[MoEBiasLayer], float | Mapping[str, float] | None]
"""What a layer is worth on held-out data, alone or by its name among other metrics; None where it only took a copy, to
be measured later."""


class Callback(Protocol):
    """Looks at each step."""

    def on_step(self, step: int, metrics: Mapping[str, float], layer: MoEBiasLayer) -> bool | None:
        """Called with what the step's line of metrics holds, once the step is in a checkpoint where one was due.

        `step` counts the steps taken; 0 is the evaluation before the first, where there is one. Where any callback
        returns True the run ends with this step as if it had been the last. The layer must not be changed.
        """


class Log(Protocol):
    """Takes the metrics of each step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the line of a step."""


@dataclass(frozen=True)
class Watching:
    """What goes on beside the steps, and how often; each may be left out.

    `evaluate_every` steps (0: once an epoch, where there are any) and after the last one the layer is measured.
    After `patience` evaluations without a better one supervised training stops, and the best layer is what it ends
    with; 0: it never does. After `deadline`, of `time.perf_counter`, no step begins.
    """

    evaluate: Evaluate | None = None
    evaluate_every: int = 0
    checkpoints: Checkpoints | None = None
    log: Log | None = None
    samples: SampleLog | None = None
    deadline: float = float("inf")
    patience: int = 0
    callbacks: Sequence[Callback] = ()


NOTHING_ELSE = Watching()
"""Steps alone."""


class Loop(ABC, Generic[Where]):
    """One run of `steps` steps. The layer is trained in place."""

    measure: str
    """What the metrics call the value of an evaluation."""

    def __init__(
        self,
        layer: MoEBiasLayer,
        optimisation: Optimisation,
        watching: Watching,
        position: Where,
        steps: int,
        steps_per_epoch: int = 1,
        processes: Processes = ALONE,
    ) -> None:
        self._layer = layer
        self._optimisation = optimisation
        self._watching = watching
        self._position = position
        self._steps = steps
        self._evaluate_every = watching.evaluate_every or steps_per_epoch
        self._processes = processes

    def resume(self, tensors: dict[str, Tensor], position: Where) -> None:
        """Takes up what a checkpoint holds."""
        self._layer.load_state_dict(without_prefix(tensors, LAYER))
        self._optimisation.load_tensors(tensors)
        self._position = position

    @abstractmethod
    def _step(self, bar: Meter) -> Metrics:
        """Takes a step, moves the position on, and says what the step was like."""

    @abstractmethod
    def _note(self, values: Mapping[str, float], bar: Meter) -> None:
        """Remembers an evaluation: its `measure`, among others."""

    @abstractmethod
    def _end(self, metrics: Metrics, bar: Meter) -> None:
        """Moves the bar, once a step is written down. May raise UserError where it makes no sense to go on."""

    def _goes_on(self) -> bool:
        """Whether another step is wanted."""
        return self._position.step < self._steps and time.perf_counter() < self._watching.deadline

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return with_prefix(self._layer.state_dict(), LAYER) | self._optimisation.tensors()

    def _loop(self, description: str, total: float, unit: str, done: float) -> None:
        """Trains to the end, `done` of the `total` units of the bar being behind it."""
        with meter(description, total, unit, self._processes.is_first) as bar, deferred_interrupt() as pressed:
            bar.advance(done)
            is_over = False
            if self._position.step == 0 and self._watching.evaluate is not None:
                is_over = self._watched(self._evaluated({}, bar))
            while not is_over and self._goes_on():
                if self._processes.any(pressed()):
                    self._save()
                    raise KeyboardInterrupt
                metrics = self._step(bar)
                if self._position.step % self._evaluate_every == 0 or self._position.step == self._steps:
                    metrics = self._evaluated(metrics, bar)
                is_over = self._watched(metrics)
                self._end(metrics, bar)

    def _evaluated(self, metrics: Metrics, bar: Meter) -> Metrics:
        found = None if self._watching.evaluate is None else self._watching.evaluate(self._layer)
        if found is None:
            return metrics
        values = found if isinstance(found, Mapping) else {self.measure: found}
        self._note(values, bar)
        return {**metrics, **values}

    def _watched(self, metrics: Metrics) -> bool:
        """Writes the step down; whether a callback ends the run."""
        step, watching = self._position.step, self._watching
        if watching.log is not None:
            watching.log.write(step, metrics)
        if step and watching.checkpoints is not None and step % watching.checkpoints.every == 0:
            self._save()
        wishes = [callback.on_step(step, metrics, self._layer) for callback in watching.callbacks]
        return self._processes.any(any(wishes))

    def _save(self) -> None:
        if self._watching.checkpoints is None:
            return
        if self._processes.is_first:
            self._watching.checkpoints.save(self._tensors(), self._position)
        self._processes.wait()


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors by longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those tensors whose names begin with the prefix, by the rest of the names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
