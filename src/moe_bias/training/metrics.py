"""What is written down of every step: a line of JSON each, and TensorBoard where it is installed.

The keys:

    step                steps taken, counted from 1; 0 is before the first
    loss                what is minimised, the mean over the objective's units and the weighted `load_balance`
    nll, kl             parts of the supervised loss, in nats per token, `kl` 0 where it has no weight; another
                        objective has metrics of its own
    router_entropy      entropy in nats of the router's probabilities, mean over the batch's tokens
    used_experts        share of the experts that at least one token of the batch is routed to
    gate_alpha/_beta    the entropy gate's parameters, where there is one
    grad_norm_*         before clipping: of the experts, of router and gate
    *_rate              the step's learning rates, of the experts, of router and gate
    tokens              of this step
    tokens_per_second   of this step, held-out tokens and writing left out
    held_out_nll        in nats per token, where this step was followed by an evaluation; held_out_loss, the
                        objective's, where its unit is more than a token or it is towards a target

With several processes all of them are of the whole batch.

Reinforcement learning has in place of `nll` and `held_out_nll`:

    reward              mean shaped reward of the step's samples, all those sampled
    correct, wrong, unparseable, timed_out, bad_gold, cut
                        shares of the samples; `cut` reached the token limit
    tokens_per_answer   end token included; `samples` how many there were
    tokens_per_right_answer
                        the same of the right answers alone, where there are any
    entropy             of the sampling policy at its temperature, in nats, over `tokens`, those of the kept groups
    threshold           tau in nats; `selected` tokens have an entropy from it up
    kl                  exact mean KL to the base over the selected tokens, in nats, after the step
    step_kl             exact mean KL to the policy that sampled over the selected tokens, in nats, after the step
    rate_share          what the step's rates were multiplied with
    clipped             share of the selected tokens whose gradient the clip took away; this and whatever else an
                        objective gives is a mean over minibatches
    sampler_gap         largest |log-probability in training - in sampling| in the first minibatch
    updates             optimiser steps
    *seconds            of the step, and within it of sampling, of judging and of updating
    held_out_accuracy   of greedy answers, where this step was followed by an evaluation, and their mean length
    held_out_tokens     in tokens, end token included
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from moe_bias.layer import MoEBiasLayer, Routing
from moe_bias.mistakes import UserError
from moe_bias.records import write_whole
from moe_bias.training.gradients import Loss
from moe_bias.training.optimisation import EXPERTS, ROUTER, GradientNorms
from moe_bias.training.processes import Processes

FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
Metrics = dict[str, float]
HELD_OUT_ACCURACY, HELD_OUT_TOKENS = "held_out_accuracy", "held_out_tokens"
_RESERVED = (
    *("step", "loss", "tokens", "tokens_per_second"),
    *("held_out_nll", "held_out_loss", HELD_OUT_ACCURACY, HELD_OUT_TOKENS),
)


def step_metrics(
    layer: MoEBiasLayer,
    loss: Loss,
    norms: GradientNorms,
    rates: Mapping[str, float],
    processes: Processes,
) -> Metrics:
    """All of a step but its number, its speed and its evaluation."""
    entropy, used = router_use(loss.routing, processes)
    own = {
        "load_balance": float(loss.load_balance),
        "router_entropy": entropy,
        "used_experts": used,
        **_gate(layer),
        "grad_norm_experts": norms.experts,
        "grad_norm_router": norms.router,
        "expert_rate": rates[EXPERTS],
        "router_rate": rates[ROUTER],
    }
    return {"loss": float(loss.total), **beside(own, loss.metrics), **own}


def beside(own: Mapping[str, float], metrics: Mapping[str, Tensor | float]) -> Metrics:
    """An objective's metrics as numbers. Raises UserError on a name that training has a metric of its own by."""
    for name in metrics:
        if name in own or name in _RESERVED:
            raise UserError(f"the objective's metric {name!r} has the name of one that training writes; rename it")
    return {name: float(value) for name, value in metrics.items()}


def router_use(routing: Routing, processes: Processes) -> tuple[float, float]:
    """Mean entropy in nats of the router's probabilities, and the share of experts with a token."""
    entropy = torch.special.entr(routing.probs).sum()
    tokens = entropy.new_tensor(float(len(routing.probs)))
    sums = processes.total(torch.cat([torch.stack([entropy, tokens]), (routing.gates > 0).sum(0).to(entropy)]))
    return float(sums[0] / sums[1]), float((sums[2:] > 0).float().mean())


def _gate(layer: MoEBiasLayer) -> Metrics:
    if layer.entropy_gate is None:
        return {}
    return {"gate_alpha": layer.entropy_gate.weight.item(), "gate_beta": layer.entropy_gate.bias.item()}


class MetricsLog:
    """The metrics of a run in its folder, each line there as soon as its step is over."""

    def __init__(self, run: Path, after: int) -> None:
        """Goes on after step `after`: what a killed run wrote of later steps is dropped."""
        run.mkdir(parents=True, exist_ok=True)
        self._file = _continued(run / FILE, after)
        self._board = _tensorboard(run, after)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the line of a step."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class SampleLog:
    """Samples of every so many steps in a run's folder, a line of JSON each; one of each is shown."""

    def __init__(self, run: Path, every: int, after: int) -> None:
        """Goes on after step `after`, as `MetricsLog` does."""
        run.mkdir(parents=True, exist_ok=True)
        self._every = every
        self._file = _continued(run / SAMPLES_FILE, after)

    def write(self, step: int, samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Adds a step's samples where it is one of those; returns the one to show."""
        if step % self._every or not samples:
            return None
        for sample in samples:
            self._file.write(json.dumps({"step": step, **sample}) + "\n")
        self._file.flush()
        return samples[0]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(run: Path) -> list[Metrics]:
    """The metrics of a run's folder, step by step; none where it has no file of them."""
    path = run / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _continued(path: Path, after: int) -> TextIO:
    """The file, open to go on after step `after`: what a killed run wrote of later steps is dropped."""
    kept = _lines_up_to(path, after) if after else []
    write_whole(path, "".join(kept).encode())
    return path.open("a", encoding="utf-8")


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of steps up to this one; a last line that was cut short is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def _tensorboard(run: Path, after: int) -> Any:
    """A writer whose later steps, where there are any of a killed run, no longer count; None without TensorBoard."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=after + 1)
