"""The sampler on vLLM: the engine samples, and keeps in files what training needs.

A layer is handed over as an adapter folder under MOE_BIAS_ADAPTERS, a few hundred kilobytes: the
plugin uses it for the requests that come after it, and the engine keeps its key-value cache, which no
adapter changes. Each sample is a request of its own with a seed of its own and a record file in
MOE_BIAS_SPOOL (see `serving.recording`). Log-probabilities are the engine's own, of what it drew from;
base logits of the drawn tokens are computed here, from hidden states and rows of the output embedding.

The same arguments give the same samples where the engine computes the same batches, as one of this
process on a CPU does. On a server, what its prefix cache holds and who else is served changes the last
bits of logits, and so, now and then, a token.

Shapes: N samples, T tokens, D hidden, K scalars.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_bias.adapter import save_layer
from moe_bias.backbone import Head
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError
from moe_bias.progress import meter
from moe_bias.records import temporary_folder
from moe_bias.rollout.decoding import Answer
from moe_bias.rollout.engines import Engine, EngineChoices, SampledTokens, SampleRequest, local_engine
from moe_bias.rollout.sampler import (
    BUFFER_BYTES,
    Rollouts,
    SampledScalars,
    SamplingChoices,
    check_prompts,
    rollouts_of,
)
from moe_bias.serving.recording import RowLayout, Spool
from moe_bias.support import RestScalars

SHARED_MEMORY = Path("/dev/shm")
LOWEST_TEMPERATURE = 0.01
"""vLLM raises temperatures below this one to it."""


@dataclass(frozen=True)
class VllmSampler:
    """Samples by an engine of vLLM; features take at most `buffer_bytes` of memory, and of the spool folder.

    `model` is the frozen model in transformers and `head` its output embedding: no pass of it is made.
    `adapters` is the engine's folder of adapters, in which the layer has the name `name`.
    """

    engine: Engine
    model: PreTrainedModel
    head: Head
    adapters: Path
    spool: Spool
    buffer_bytes: int = BUFFER_BYTES
    name: str = field(default_factory=lambda: f"sampler-{os.getpid()}")

    def sample(
        self,
        prompts: Sequence[list[int]],
        layer: MoEBiasLayer,
        choices: SamplingChoices,
        seed: int,
        description: str = "samples",
    ) -> Rollouts:
        """See `Sampler`. Raises UserError where there is no room for the features, or the engine refuses."""
        check_choices(choices)
        samples = len(prompts) * choices.group
        check_prompts(prompts, choices, self.spool.layout.row.itemsize, self.buffer_bytes)
        self.spool.check_room(samples * choices.max_new_tokens)
        save_layer(_acting(layer), self.adapters / self.name, self.model)
        records = [f"{uuid4().hex}-{number}" for number in range(samples)]
        seeds = torch.randint(2**31, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        requests = [
            SampleRequest(prompts[number // choices.group], seeds[number], self._arguments(record, choices))
            for number, record in enumerate(records)
        ]
        try:
            for record in records:
                self.spool.create(record, choices.max_new_tokens)
            found = self._answers(requests, choices, description)
            return self._rollouts(found, records, layer, choices)
        finally:
            self.spool.remove(records)

    def close(self) -> None:
        """Takes the layer out of the engine's folder."""
        shutil.rmtree(self.adapters / self.name, ignore_errors=True)

    def _arguments(self, record: str, choices: SamplingChoices) -> dict[str, str | float]:
        arguments: dict[str, str | float] = {"moe_bias": self.name, "moe_bias_record": record}
        return arguments if choices.keep_above is None else {**arguments, "moe_bias_record_above": choices.keep_above}

    def _answers(
        self, requests: Sequence[SampleRequest], choices: SamplingChoices, description: str
    ) -> list[SampledTokens]:
        found: dict[int, SampledTokens] = {}
        with meter(description, len(requests), "samples", visible=bool(description)) as bar:
            for number, answer in self.engine.answers(requests, choices):
                found[number] = answer
                bar.advance(1)
        return [found[number] for number in range(len(requests))]

    def _rollouts(
        self, found: Sequence[SampledTokens], records: Sequence[str], layer: MoEBiasLayer, choices: SamplingChoices
    ) -> Rollouts:
        """The tokens sample after sample; a record goes when it has been read: hidden states are held once."""
        tokens = sum(len(answer.token_ids) for answer in found)
        hidden_TD = torch.empty(tokens, self.head.hidden_size, dtype=self.spool.layout.dtype)
        scalars, logits, start = [], [], 0
        for answer, record in zip(found, records, strict=True):
            scalars_tK, hidden_tD = self.spool.read(record, len(answer.token_ids))
            self.spool.remove([record])
            hidden_TD[start : start + len(hidden_tD)] = hidden_tD
            start += len(hidden_tD)
            scalars.append(scalars_tK)
            logits.append(self._logits(hidden_tD, answer.token_ids))
        _, entropy, log_partition, log_sum_exp, mean_logit, policy_entropy = torch.cat(scalars).T.contiguous()
        columns = SampledScalars(
            torch.tensor([token for answer in found for token in answer.token_ids]),
            torch.cat(logits) / choices.temperature,
            entropy,
            log_partition,
            RestScalars(log_sum_exp, mean_logit),
            torch.tensor([value for answer in found for value in answer.log_probs]),
            policy_entropy,
        )
        answers = [_answer(answer.token_ids, choices.stop_ids) for answer in found]
        kept_T = None if choices.keep_above is None else policy_entropy >= choices.keep_above
        return rollouts_of(hidden_TD, columns, answers, layer, choices, kept_T)

    def _logits(self, hidden_tD: Tensor, token_ids: list[int]) -> Tensor:
        """The drawn tokens' base logits (T,) at temperature 1, on the CPU."""
        token_t = torch.tensor(token_ids, device=self.head.device)
        return self.head.token_logits(hidden_tD.to(self.head.device), token_t).cpu()


@contextmanager
def local_sampler(
    model: PreTrainedModel, head: Head, choices: EngineChoices, buffer_bytes: int = BUFFER_BYTES
) -> Iterator[VllmSampler]:
    """A sampler on an engine of this process, with folders of its own, the record files in memory where it can be.

    Raises UserError where vLLM is not installed. A process has one engine at a time.
    """
    memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with (
        temporary_folder("adapters") as adapters,
        temporary_folder("records", memory) as records,
    ):
        engine = local_engine(choices, adapters, records)
        layout = RowLayout.of_model(head.hidden_size, head.dtype)
        try:
            yield VllmSampler(engine, model, head, adapters, Spool(records, layout), buffer_bytes)
        finally:
            engine.close()


def check_choices(choices: SamplingChoices) -> None:
    """Raises UserError on choices that vLLM cannot sample by."""
    if choices.first_token_only:
        raise UserError("the first token alone cannot be biased in vLLM; sample with transformers")
    if choices.temperature < LOWEST_TEMPERATURE:
        raise UserError(f"vLLM samples at {LOWEST_TEMPERATURE} in place of temperature = {choices.temperature}")


def _acting(layer: MoEBiasLayer) -> MoEBiasLayer:
    """The layer, with where it acts now in its config: trainers change that, and files have the config's."""
    acting = copy.copy(layer)
    acting.config = layer.config.model_copy(update={"reach": layer.reach})
    return acting


def _answer(token_ids: list[int], stop_ids: Sequence[int]) -> Answer:
    if token_ids[-1] in stop_ids:
        return Answer(token_ids[:-1], token_ids[-1])
    return Answer(token_ids, None)
