"""The sampler on transformers: one pass of the frozen model gives samples and their features.

Of each step's logits one pass takes base entropy, log Z, R and A, the layer moves them, and a token
is drawn. What is kept goes to the CPU step by step, and is put in order once, at the end. A sample's
random numbers are its own, so that they do not depend on the batch that it is in.

Shapes: N samples, L token limit, B rows still running, T sampled tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_bias.backbone import Head, adapted_logits
from moe_bias.chunks import longest_first
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import Meter, meter
from moe_bias.rollout.decoding import Answer, answer_batch
from moe_bias.rollout.draw import draw
from moe_bias.rollout.sampler import (
    BUFFER_BYTES,
    Rollouts,
    SampledScalars,
    SamplingChoices,
    check_prompts,
    rollouts_of,
)
from moe_bias.serving.recording import kept_dtype
from moe_bias.support import RestScalars, at_temperature, scalars_at_temperature, split_vocabulary

SCALAR_BYTES = 160
"""A token's numbers besides its hidden state: 80 bytes while sampling, 73 in the result."""


@dataclass(frozen=True)
class _Kept:
    """Of one step: sample (B,) and hidden (B, D), and per row token, u_y, H, log Z, R, A, log pi, H(pi) in float64."""

    sample: Tensor
    step: int
    hidden: Tensor
    scalars: Tensor


@dataclass(frozen=True)
class TransformersSampler:
    """Samples from a frozen transformers model; its features take at most `buffer_bytes` of memory."""

    model: nn.Module
    head: Head
    buffer_bytes: int = BUFFER_BYTES

    def sample(
        self,
        prompts: Sequence[list[int]],
        layer: MoEBiasLayer,
        choices: SamplingChoices,
        seed: int,
        description: str = "samples",
    ) -> Rollouts:
        """See `Sampler`. Raises UserError where `buffer_bytes` might not hold the features, or a prompt is empty."""
        check_prompts(prompts, choices, self.token_bytes, self.buffer_bytes)
        samples = len(prompts) * choices.group
        generator = torch.Generator().manual_seed(seed)
        uniform_NL = torch.rand(samples, choices.max_new_tokens, dtype=torch.float64, generator=generator)
        answers = [Answer([], None)] * samples
        kept: list[_Kept] = []
        with meter(description, samples, "samples", visible=bool(description)) as bar:
            for batch in longest_first(prompts, choices.batch_size):
                sample_B = samples_of(batch, choices.group)
                recorder = _Recorder(self.head, layer, choices, sample_B, uniform_NL[sample_B], kept)
                found = self._answers([prompts[index] for index in batch], recorder, choices, bar)
                for number, answer in zip(sample_B.tolist(), found, strict=True):
                    answers[number] = answer
        return _in_order(kept, answers, layer, choices)

    def sample_batch(
        self,
        prompts: Sequence[list[int]],
        numbers: Sequence[int],
        layer: MoEBiasLayer,
        choices: SamplingChoices,
        seed: int,
    ) -> Rollouts:
        """The samples that `sample` draws in one of its batches, to the bit, without the others.

        `prompts` are those of the batch in its order, `numbers` their places among all that `sample` would be given.
        Raises UserError as `sample` does.
        """
        check_prompts(prompts, choices, self.token_bytes, self.buffer_bytes)
        uniform_RL = _uniform_of(samples_of(numbers, choices.group), choices.max_new_tokens, seed)
        kept: list[_Kept] = []
        recorder = _Recorder(self.head, layer, choices, torch.arange(len(uniform_RL)), uniform_RL, kept)
        with meter("", len(uniform_RL), "samples", visible=False) as bar:
            answers = self._answers(prompts, recorder, choices, bar)
        return _in_order(kept, answers, layer, choices)

    @property
    def token_bytes(self) -> int:
        """What is kept of a sampled token."""
        return self.head.hidden_size * kept_dtype(self.head.dtype).itemsize + SCALAR_BYTES

    def _answers(
        self, prompts: Sequence[list[int]], recorder: _Recorder, choices: SamplingChoices, bar: Meter
    ) -> list[Answer]:
        return answer_batch(
            self.model,
            prompts,
            choices.group,
            recorder.choose,
            stop_ids=choices.stop_ids,
            limit=choices.max_new_tokens,
            bar=bar,
        )


class _Recorder:
    """Chooses a batch's tokens, and appends what was computed for them to `kept`.

    `sample` (R,) are the numbers of the batch's rows among all samples, `uniform` (R, L) their
    random numbers.
    """

    def __init__(
        self,
        head: Head,
        layer: MoEBiasLayer,
        choices: SamplingChoices,
        sample_R: Tensor,
        uniform_RL: Tensor,
        kept: list[_Kept],
    ) -> None:
        self._head, self._layer, self._choices, self._kept = head, layer, choices, kept
        self._sample_R, self._uniform_RL = sample_R.to(head.device), uniform_RL.to(head.device)
        self._split = split_vocabulary(layer.support_or_all().to(head.device), head.vocab_size)

    def choose(self, hidden_BD: Tensor, number_B: Tensor, step: int) -> Tensor:
        """The next token of each row: see `decoding.Choose`."""
        biased = step == 0 or not self._choices.first_token_only
        scalars_BK, token_B = self._step(hidden_BD, self._uniform_RL[number_B, step], biased)
        hidden_BD = hidden_BD.to("cpu", kept_dtype(self._head.dtype), copy=True)
        self._kept.append(_Kept(self._sample_R[number_B].cpu(), step, hidden_BD, scalars_BK.cpu()))
        return token_B

    def _step(self, hidden_BD: Tensor, uniform_B: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
        temperature = self._choices.temperature
        logits_BV = self._head.logits(hidden_BD)
        base = scalars_at_temperature(logits_BV, temperature, self._split)
        policy_BV = logits_BV
        if biased:
            policy_BV = adapted_logits(self._layer, self._head.transform, hidden_BD, base.entropy, logits_BV)
        drawn = draw(at_temperature(policy_BV, temperature), uniform_B)
        logit_B = at_temperature(logits_BV.gather(-1, drawn.token[:, None]).squeeze(-1), temperature)
        rest = base.rest
        columns = (
            drawn.token,
            logit_B,
            base.entropy,
            base.log_partition,
            rest.log_sum_exp,
            rest.mean_logit,
            drawn.log_prob,
            drawn.entropy,
        )
        return torch.stack([column.double() for column in columns], dim=-1), drawn.token


def samples_of(prompts: Sequence[int], group: int) -> Tensor:
    """Numbers (N,) of the samples of the prompts of these numbers, prompt after prompt."""
    return (torch.tensor(prompts)[:, None] * group + torch.arange(group)).flatten()


def _uniform_of(sample_R: Tensor, limit: int, seed: int) -> Tensor:
    """Rows (R, L) of the numbers that the seed gives all samples, which are one row after the other of its stream."""
    generator, places = torch.Generator().manual_seed(seed), {int(n): place for place, n in enumerate(sample_R)}
    uniform_RL = torch.empty(len(sample_R), limit, dtype=torch.float64)
    for number in range(int(sample_R.max()) + 1):
        row_L = torch.rand(limit, dtype=torch.float64, generator=generator)
        if number in places:
            uniform_RL[places[number]] = row_L
    return uniform_RL


def _in_order(kept: list[_Kept], answers: list[Answer], layer: MoEBiasLayer, choices: SamplingChoices) -> Rollouts:
    """The tokens sample after sample. Empties the list as it goes: hidden states are held once."""
    length_N = torch.tensor([len(answer.all_ids) for answer in answers])
    start_N = length_N.cumsum(0) - length_N
    tokens = int(length_N.sum())
    hidden_TD = kept[0].hidden.new_empty(tokens, kept[0].hidden.shape[-1])
    scalars_TK = kept[0].scalars.new_empty(tokens, kept[0].scalars.shape[-1])
    while kept:
        step = kept.pop()
        place_B = start_N[step.sample] + step.step
        hidden_TD[place_B], scalars_TK[place_B] = step.hidden, step.scalars
    token, logit, entropy, log_partition, log_sum_exp, mean_logit, log_prob, policy_entropy = scalars_TK.T.contiguous()
    rest = RestScalars(log_sum_exp, mean_logit)
    scalars = SampledScalars(token.long(), logit, entropy, log_partition, rest, log_prob, policy_entropy)
    return rollouts_of(hidden_TD, scalars, answers, layer, choices)
