"""Answers of a model and of MoE-Bias adapters by a pool of workers, batch by batch: what `eval` and `evaluate` keep.

Batches are those that one process would ask, whoever answers them, so that answers are the same to the last bit of
their logits. A batch goes to the worker that is idle first. Adapters are sent with the worker's beginning: they are
small. The process that began grades, and keeps what is answered problem by problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from moe_bias.cluster.model import NamedModel
from moe_bias.cluster.pool import Member, Pending, Pool, Worker, opened
from moe_bias.cluster.weights import Row, put, row_of
from moe_bias.config import Cluster, LayerConfig
from moe_bias.evaluation.answering import Asker
from moe_bias.frozen import Frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import meter, without_bars
from moe_bias.rollout.answers import AnswerChoices, sampled_answers
from moe_bias.rollout.decoding import TextAnswer
from moe_bias.rollout.policy import Policy
from moe_bias.training.problems import policy_of

_ADVICE = "lower `batch_size`, or give workers more memory"
ByProblem = list[list[list[TextAnswer]]]
"""Answers by problem, policy and sample."""


@dataclass(frozen=True)
class SentLayer:
    """A layer on its way."""

    config: LayerConfig
    strength: float
    row: Row

    @classmethod
    def of(cls, layer: MoEBiasLayer) -> SentLayer:
        """As it is."""
        return cls(layer.config, layer.strength, row_of(layer))

    def on(self, base: Frozen) -> MoEBiasLayer:
        """The layer, beside the model's output embedding."""
        layer = base.head.layer(self.config).to(base.device).requires_grad_(False)
        layer.strength = self.strength
        put(self.row, layer)
        return layer


class AnswerWorker(Worker):
    """Answers prompts under policies by their names."""

    def __init__(self, model: NamedModel, layers: Mapping[str, SentLayer | None]) -> None:
        self._model, self._layers = model, layers
        self._base: Frozen
        self._policies: dict[str, Policy]

    def load(self, on_gpu: bool) -> None:
        """Loads the model, and makes the layers."""
        base = self._base = self._model.loaded(on_gpu)
        layers = {name: None if sent is None else sent.on(base) for name, sent in self._layers.items()}
        self._policies = {name: policy_of(layer, base.head) for name, layer in layers.items()}

    def answer(
        self, names: Sequence[str], prompts: Sequence[list[int]], choices: AnswerChoices, seeds: Sequence[int]
    ) -> ByProblem:
        """All in one batch."""
        base, policies = self._base, [self._policies[name] for name in names]
        with without_bars(), meter("", 1, "answers", visible=False) as bar:
            found = sampled_answers(base.model, base.head, prompts, policies, choices, seeds, bar)
        return [
            [
                [TextAnswer(str(base.tokenizer.decode(one.token_ids)), len(one.all_ids), one.finished) for one in group]
                for group in by_policy
            ]
            for by_policy in found
        ]


@dataclass(frozen=True)
class AnswersByWorkers:
    """Has the workers of a pool answer."""

    pool: Pool

    def ask(self, asker: Asker, names: Sequence[str], numbers: Sequence[int]) -> None:
        """Has every policy of these names answer the problems of these numbers, and keeps what is answered.

        Raises UserError where no worker can be had, or some die over one batch again and again.
        """
        left, choices = set(numbers), asker.choices
        batches = asker.batches(len(names), left)

        def ask(member: Member, batch: range) -> Pending:
            prompts, seeds = [asker.prompts[n] for n in batch], [asker.seeds[n] for n in batch]
            return self.pool.ask(member, "answer", list(names), prompts, choices, seeds)

        total = sum(map(len, batches)) * len(names) * choices.samples
        with meter(", ".join(names), total, "answers") as bar:
            for batch, _, found in self.pool.each(batches, ask, _about, _ADVICE):
                asker.keep(names, batch, found, left)
                bar.advance(len(batch) * len(names) * choices.samples)


@contextmanager
def answer_pool(
    cluster: Cluster, model: NamedModel, layers: Mapping[str, MoEBiasLayer | None]
) -> Iterator[AnswersByWorkers]:
    """Workers that answer under these layers by name, while the block runs. Raises UserError as `pool.opened` does."""
    sent = {name: None if layer is None else SentLayer.of(layer) for name, layer in layers.items()}
    with opened(cluster, AnswerWorker, (model, sent), model.device) as pool:
        yield AnswersByWorkers(pool)


def _about(batch: range) -> str:
    return f"the answers to problems {batch.start + 1} to {batch.stop}"
