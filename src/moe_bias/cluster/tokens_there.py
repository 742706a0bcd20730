"""The selected tokens of a step where they were sampled, and updates by them: weights go out, gradients come back.

An update is two calls of each worker: one takes up the weights, tells the KL that bounds them and where the next
minibatch's tokens are routed, whose shares the load-balance loss is of; the other gives the gradient.

Shapes: N numbers of a layer, T tokens, E experts, S samples of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from moe_bias.cluster import exact
from moe_bias.cluster.owners import Owners
from moe_bias.cluster.parts import Key, PartSums, Placing, Seen
from moe_bias.cluster.pool import Member
from moe_bias.cluster.weights import Both, Change, Weights, row_of
from moe_bias.config import RLConfig
from moe_bias.layer import MoEBiasLayer
from moe_bias.training.metrics import Metrics
from moe_bias.training.objectives import Unit
from moe_bias.training.step_tokens import Lesson, Minibatches, Take


class TokensThere:
    """The selected tokens of a step, each part where it was sampled: `StepTokens`."""

    def __init__(self, owners: Owners, layer: MoEBiasLayer, settings: RLConfig, unit: Unit, placing: Placing) -> None:
        self._owners, self._layer = owners, layer
        counts_S = torch.from_numpy(placing.counts)
        self._size = int(counts_S.sum())
        example_T = torch.arange(len(counts_S)).repeat_interleave(counts_S)
        self._minibatches = Minibatches.of(example_T, unit, settings, placing.step)
        self._tokens = [len(index_T) for index_T in self._minibatches]
        self._weights = Weights(owners.start, owners.start)
        self._versions: dict[int, int] = {}
        self._seen: list[Seen] = []
        self._next = 0
        self._bounded = settings.kl_bound is not None, settings.step_kl is not None
        self._before = replace(owners.pool.traffic)
        self._updates = 0

    def __len__(self) -> int:
        return self._size

    def takes(self) -> Iterator[Take]:
        """See `StepTokens`."""
        for number in range(len(self._minibatches)):
            self._next = number
            yield partial(self._take, number)

    def kl(self) -> float:
        """See `StepTokens`."""
        return self._mean(lambda one: one.kl)

    def kl_from_sampler(self) -> float:
        """See `StepTokens`."""
        return self._mean(lambda one: one.kl_from_sampler)

    def metrics(self) -> Metrics:
        """Bytes that the step's updates moved, in all, and for each update and worker."""
        total, workers = self._owners.pool.traffic.since(self._before), max(len(self._versions), 1)
        return {
            "update_bytes": float(total),
            "update_bytes_each": total / (max(self._updates, 1) * workers),
            "workers": float(workers),
        }

    def _mean(self, value: Callable[[Seen], float | None]) -> float:
        seen = self._looked()
        if any(value(one) is None for one in seen):
            seen = self._look(True, True, self._next)
        return math.fsum(value(one) or 0.0 for one in seen) / self._size

    def _looked(self) -> list[Seen]:
        """What workers said of the weights as they are, asked anew where these have changed."""
        return self._seen_now() or self._look(*self._bounded, self._next)

    def _seen_now(self) -> list[Seen]:
        """What workers said, where the weights are those that it was said of."""
        return self._seen if np.array_equal(row_of(self._layer), self._weights.now) else []

    def _look(self, kl: bool, kl_from_sampler: bool, number: int | None) -> list[Seen]:
        change = self._change()
        if number is not None and number >= len(self._minibatches):
            number = None
        found = self._owners.ask("look", lambda member, _: (change(member), kl, kl_from_sampler, number))
        self._seen = sorted((one for part in found for one in part), key=lambda one: one.key)
        return self._seen

    def _take(self, number: int) -> Lesson:
        """Two calls: for the routed tokens where they are not known yet, and for the gradient."""
        seen = self._seen_now()
        if not seen or any(one.routed is None for one in seen):
            seen = self._look(False, False, number)
        routed_E = np.sum([one.routed for one in seen if one.routed is not None], axis=0)
        told = self._gradient(number, routed_E)
        self._weights.hold()
        self._next, self._updates, self._seen = number + 1, self._updates + 1, []
        return self._lesson(told, routed_E, self._tokens[number])

    def _gradient(self, number: int, routed_E: NDArray[np.int64]) -> list[PartSums]:
        """Puts the gradient of a minibatch to the layer's parameters."""
        change = self._change()
        for level in range(exact.LEVELS):
            with_level = partial(self._to_learn, change, number, routed_E, level)
            found = self._owners.ask("learn", with_level)
            sums = [total for total, _ in found]
            if all(total is not None for total in sums):
                self._put(exact.gradient(np.sum(sums, axis=0), level))
                break
        else:
            self._put(np.full(sum(p.numel() for p in self._layer.parameters()), np.nan, np.float32))
        return sorted((one for _, told in found for one in told), key=lambda one: one.key)

    def _to_learn(
        self,
        change: Callable[[Member], Change],
        number: int,
        routed_E: NDArray[np.int64],
        level: int,
        member: Member,
        keys: Sequence[Key],
    ) -> tuple[Change, int, NDArray[np.int64], int, int]:
        return change(member), number, routed_E, level, len(self._owners)

    def _put(self, gradient_N: NDArray[np.float32]) -> None:
        start = 0
        for parameter in self._layer.parameters():
            part = torch.from_numpy(gradient_N[start : start + parameter.numel()])
            parameter.grad = part.view_as(parameter).to(parameter)
            start += parameter.numel()

    def _lesson(self, told: Sequence[PartSums], routed_E: NDArray[np.int64], tokens: int) -> Lesson:
        names = told[0].metrics
        return Lesson(
            math.fsum(one.loss for one in told),
            math.fsum(one.load_balance for one in told),
            {name: math.fsum(one.metrics[name] for one in told) for name in names},
            max(one.sampler_gap for one in told),
            math.fsum(one.router_entropy for one in told) / tokens,
            float((routed_E > 0).mean()),
        )

    def _change(self) -> Callable[[Member], Change]:
        """What each worker is to be told of the weights as they are now."""
        before = self._weights.version
        change, anchor = self._weights.change_to(row_of(self._layer)), self._weights.anchor
        now, version = self._weights.now, self._weights.version

        def of_member(member: Member) -> Change:
            known = self._versions.get(member.number, 0)
            self._versions[member.number] = version
            if known == version:
                return None
            return change if known == before and change is not None else Both(anchor, now)

        return of_member
