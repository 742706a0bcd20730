"""How good a draft model is for speculative decoding of a target, under layers and without, over the whole vocabulary.

Speculative decoding (arXiv 2211.17192, 2302.01318) accepts a draft's token with probability

    a_t = sum_i min(p_i, pi'_i)

whatever the token, p the target's distribution there and pi' the draft's. Of k drafts the expected number of tokens
that one pass of the target gives, its own one after the last accepted draft among them, is then from position t on

    1 + sum_{j = 1..k} prod_{i < j} a_{t + i}

along the given text; its mean over all t with k tokens to go (or with all of them, in a shorter answer) is what is
reported. At temperature 1, and teacher-forced: on the text as it is given, which is the target's own where that
was sampled from it.

Shapes: T tokens, C a chunk of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_bias.backbone import Head, adapted_logits
from moe_bias.columns import Columns, joined
from moe_bias.divergence import acceptance, in_common
from moe_bias.evaluation.statistics import Estimate, Floats, ratio_of_sums
from moe_bias.features.extract import Features, chunk_rows
from moe_bias.features.source import FeatureSource
from moe_bias.features.target import target_of
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import meter

DRAFTS = 4
"""Tokens that a draft model writes before the target looks, where nothing else is said."""
_NOTHING = 1e-5
"""A mean share rejected that is rounding: a draft which is its own target."""


@dataclass(frozen=True)
class DraftTokens(Columns):
    """Of each token (T,): the share accepted, KL(p|pi') in nats, and whether both models' likeliest token is one."""

    acceptance: Tensor
    forward: Tensor
    agrees: Tensor


@torch.no_grad()
def draft_tokens(
    layers: Sequence[MoEBiasLayer | None], source: FeatureSource, head: Head, target_head: Head
) -> list[DraftTokens]:
    """What the draft is under each layer, None being the draft as it is, on tokens that have a target.

    The output embeddings run over all tokens, once for all layers.
    """
    parts: list[list[DraftTokens]] = []
    with meter("accepted drafts", len(source), "tokens") as bar:
        for start in range(0, len(source), min(chunk_rows(head), chunk_rows(target_head))):
            batch = source.at(slice(start, start + min(chunk_rows(head), chunk_rows(target_head)))).to(head.device)
            parts.append(_of_chunk(layers, batch, head, target_head))
            bar.advance(len(batch))
    return [joined([part[number] for part in parts]).to("cpu") for number in range(len(layers))]


def _of_chunk(
    layers: Sequence[MoEBiasLayer | None], batch: Features, head: Head, target_head: Head
) -> list[DraftTokens]:
    hidden_CD = target_of(batch).hidden.to(target_head.device, target_head.dtype)
    target_CV = in_common(target_head.logits(hidden_CD).to(head.device), head.vocab_size)
    logits_CV = head.logits(batch.hidden.to(head.dtype))
    log_p_CV = target_CV.log_softmax(-1)
    found = []
    for layer in layers:
        policy_CV = logits_CV
        if layer is not None:
            policy_CV = adapted_logits(layer, head.transform, batch.hidden, batch.entropy, logits_CV)
        gap_CV = (log_p_CV - policy_CV.log_softmax(-1)).nan_to_num(nan=0.0)
        found.append(
            DraftTokens(
                acceptance(target_CV, policy_CV),
                torch.linalg.vecdot(log_p_CV.exp(), gap_CV),
                policy_CV.argmax(-1) == target_CV.argmax(-1),
            )
        )
    return found


@dataclass(frozen=True)
class DraftFigures:
    """Of a draft on held-out answers, with intervals over them.

    `accepted` and `agreement` are shares of the tokens, `tokens` those that a pass of the target gives, `kl` in nats a
    token from the target. `rejected` is the share of tokens not accepted over that of the draft as it is; None for
    itself, and where it loses none.
    """

    accepted: Estimate
    tokens: Estimate
    agreement: Estimate
    kl: Estimate
    rejected: Estimate | None = None

    def record(self) -> dict[str, Any]:
        """As a record has it."""
        return asdict(self)


def draft_figures(
    found: Mapping[str, DraftTokens], example_T: Tensor, by_unit: Callable[[Floats], Floats], drafts: int = DRAFTS
) -> dict[str, DraftFigures]:
    """Figures of each draft by name, the first one the draft as it is.

    `example_T` numbers the tokens' answers from 0, `by_unit` makes sums over what is independent of sums over answers.
    """
    ones = _per_answer(torch.ones(len(example_T)), example_T)
    first = next(iter(found.values()))
    missed = float((1 - first.acceptance).mean()) > _NOTHING

    def share(values_T: Tensor, of: Tensor | None = None) -> Estimate:
        below = ones if of is None else _per_answer(of, example_T)
        return ratio_of_sums(by_unit(_per_answer(values_T, example_T)), by_unit(below))

    def passes(acceptance_T: Tensor) -> Estimate:
        tokens, starts = tokens_of_passes(acceptance_T, example_T, drafts)
        return ratio_of_sums(by_unit(tokens), by_unit(starts))

    return {
        name: DraftFigures(
            share(one.acceptance),
            passes(one.acceptance),
            share(one.agrees),
            share(one.forward),
            None if one is first or not missed else share(1 - one.acceptance, 1 - first.acceptance),
        )
        for name, one in found.items()
    }


def tokens_of_passes(acceptance_T: Tensor, example_T: Tensor, drafts: int) -> tuple[Floats, Floats]:
    """By answer, the sum over starting positions of the expected tokens of a pass, and how many those are."""
    lengths = example_T.unique_consecutive(return_counts=True)[1].tolist()
    sums, counts = [], []
    for one in acceptance_T.double().split(lengths):
        windows = one.unfold(0, min(drafts, len(one)), 1)
        sums.append(float((1 + windows.cumprod(-1).sum(-1)).sum()))
        counts.append(len(windows))
    return np.array(sums), np.array(counts, dtype=np.float64)


def _per_answer(values_T: Tensor, example_T: Tensor) -> Floats:
    return np.bincount(example_T.numpy(), weights=values_T.double().numpy()).astype(np.float64)
