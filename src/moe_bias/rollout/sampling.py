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
from moe_bias.config import UserError
from moe_bias.features.extract import Features, place_in_example, support_columns
from moe_bias.features.writer import in_bytes
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.progress import Meter, meter
from moe_bias.rollout.decoding import Answer, answer_batch, longest_first
from moe_bias.rollout.draw import draw
from moe_bias.rollout.sampler import Rollouts, SamplingChoices
from moe_bias.support import RestScalars, VocabularySplit, base_scalars, split_vocabulary

BUFFER_BYTES = 4 * 2**30
_SCALAR_BYTES = 160
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
        self._check(prompts, choices)
        samples = len(prompts) * choices.group
        generator = torch.Generator().manual_seed(seed)
        uniform_NL = torch.rand(samples, choices.max_new_tokens, dtype=torch.float64, generator=generator)
        answers = [Answer([], False)] * samples
        kept: list[_Kept] = []
        with meter(description, samples, "samples", visible=bool(description)) as bar:
            for batch in longest_first(prompts, choices.batch_size):
                sample_B = (torch.tensor(batch)[:, None] * choices.group + torch.arange(choices.group)).flatten()
                recorder = _Recorder(self.head, layer, choices, sample_B, uniform_NL[sample_B], kept)
                found = self._answers([prompts[index] for index in batch], recorder, choices, bar)
                for number, answer in zip(sample_B.tolist(), found, strict=True):
                    answers[number] = answer
        return _in_order(kept, answers, layer, choices)

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

    def _check(self, prompts: Sequence[list[int]], choices: SamplingChoices) -> None:
        if not prompts:
            raise UserError("no prompts to sample answers to")
        if [] in prompts:
            raise UserError(f"prompt {list(prompts).index([])} has no tokens; a sample needs one to follow")
        each = self.head.hidden_size * _hidden_type(self.head).itemsize + _SCALAR_BYTES
        needed = len(prompts) * choices.group * choices.max_new_tokens * each
        if needed > self.buffer_bytes:
            raise UserError(
                f"buffer_bytes = {in_bytes(self.buffer_bytes)} cannot hold {len(prompts)} prompts x {choices.group} "
                f"samples x {choices.max_new_tokens} tokens of {in_bytes(each)}, {in_bytes(needed)}; raise it, or "
                "sample fewer at a time"
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
        self._split = _split_of(layer, head)

    def choose(self, hidden_BD: Tensor, number_B: Tensor, step: int) -> Tensor:
        """The next token of each row: see `decoding.Choose`."""
        biased = step == 0 or not self._choices.first_token_only
        scalars_BK, token_B = self._step(hidden_BD, self._uniform_RL[number_B, step], biased)
        hidden_BD = hidden_BD.to("cpu", _hidden_type(self._head), copy=True)
        self._kept.append(_Kept(self._sample_R[number_B].cpu(), step, hidden_BD, scalars_BK.cpu()))
        return token_B

    def _step(self, hidden_BD: Tensor, uniform_B: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
        temperature = self._choices.temperature
        logits_BV = self._head.logits(hidden_BD)
        base = base_scalars(_divided(logits_BV, temperature), self._split)
        entropy_B = base.entropy if temperature == 1 else entropy_from_logits(logits_BV)
        policy_BV = logits_BV
        if biased:
            policy_BV = adapted_logits(self._layer, self._head.transform, hidden_BD, entropy_B, logits_BV)
        drawn = draw(_divided(policy_BV, temperature), uniform_B)
        logit_B = _divided(logits_BV.gather(-1, drawn.token[:, None]).squeeze(-1), temperature)
        rest = base.rest
        columns = (
            drawn.token,
            logit_B,
            entropy_B,
            base.log_partition,
            rest.log_sum_exp,
            rest.mean_logit,
            drawn.log_prob,
            drawn.entropy,
        )
        return torch.stack([column.double() for column in columns], dim=-1), drawn.token


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _hidden_type(head: Head) -> torch.dtype:
    """Of the hidden states that are kept: bfloat16 as it is, anything else in float32."""
    return torch.bfloat16 if head.dtype == torch.bfloat16 else torch.float32


def _support_of(layer: MoEBiasLayer) -> Tensor:
    return torch.arange(layer.vocab_size) if layer.support is None else layer.support.cpu()


def _split_of(layer: MoEBiasLayer, head: Head) -> VocabularySplit:
    return split_vocabulary(_support_of(layer).to(head.device), head.vocab_size)


def _in_order(kept: list[_Kept], answers: list[Answer], layer: MoEBiasLayer, choices: SamplingChoices) -> Rollouts:
    """The tokens sample after sample. Empties the list as it goes: hidden states are held once."""
    length_N = torch.tensor([len(answer.token_ids) + answer.finished for answer in answers])
    start_N = length_N.cumsum(0) - length_N
    example_T = torch.arange(len(answers)).repeat_interleave(length_N)
    hidden_TD = kept[0].hidden.new_empty(len(example_T), kept[0].hidden.shape[-1])
    scalars_TK = kept[0].scalars.new_empty(len(example_T), kept[0].scalars.shape[-1])
    while kept:
        step = kept.pop()
        place_B = start_N[step.sample] + step.step
        hidden_TD[place_B], scalars_TK[place_B] = step.hidden, step.scalars
    token, logit, entropy, log_partition, log_sum_exp, mean_logit, log_prob, policy_entropy = scalars_TK.T.contiguous()
    support_M = _support_of(layer)
    features = Features(
        hidden_TD,
        token.long(),
        example_T,
        place_in_example(example_T),
        logit.float(),
        entropy.float(),
        log_partition,
        RestScalars(log_sum_exp, mean_logit),
        support_columns(support_M, layer.vocab_size)[token.long()],
        support_M,
    )
    biased_T = (features.position == 0) | (not choices.first_token_only)
    return Rollouts(
        features, log_prob.float(), policy_entropy.float(), biased_T, answers, choices.group, choices.temperature
    )
