"""Probes of what the last hidden state holds: small networks on stored features, trained as the layer is.

    network     z' = z + W_S w (c + U gelu(V n(h) + o))     a two-layer network to a move in hidden space
    choice      z'_k = z_k + e_k (c + U gelu(V n(h) + o)) + (a + A gelu(V n(h) + o)) (1[rank k], log q_k)

`network` is the layer with units in place of linear experts: their number bounds the rank of the map from h to logits,
and with enough of them it is any function of h. So it is a table and coefficients, and trains by the layer's own loop;
w is the entropy gate. `choice` moves the logits of the base's top K tokens of the support alone: e_k is the token's row
of the output embedding, its rank and its log-probability are what the base thinks of it. All else keeps its logit, so
that with the rest's log-sum-exp the likelihood is exact, over the whole vocabulary, as in `support`.

A probe is a lower bound of what a function of the last hidden state can do: a larger one, or one trained for longer,
may find more.

Shapes: T tokens, D hidden, H units, K candidates, M support.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bias.backbone import Head
from moe_bias.chunks import UPDATE, even_slices
from moe_bias.columns import Columns, joined
from moe_bias.config import LayerConfig, SFTConfig
from moe_bias.features.base_logits import BaseLogits
from moe_bias.features.extract import Features
from moe_bias.features.source import FeatureSource
from moe_bias.layer import Mixture, MoEBiasLayer, Routing
from moe_bias.progress import meter
from moe_bias.training.batches import batches

UNITS = 128
MAX_GRAD_NORM = 1.0
_LOWEST = -15.0
"""Log-probabilities as a feature are raised to this, and divided by 5."""


class HiddenNetwork(MoEBiasLayer):
    """A two-layer network from the hidden state to a move in hidden space, with the entropy gate, as a layer.

    `reads` (1, H, D) and `offsets` (H,) are the first layer, `writes` (1, H, D) and `directions` (1, D) the second.
    """

    def __init__(self, head: Head, units: int, support: tuple[int, ...] | None) -> None:
        config = LayerConfig(
            experts="linear", num_experts=1, top_k=1, expert_rank=units, support=support, load_balance_weight=0.0
        )
        super().__init__(config, head.hidden_size, head.vocab_size, head.rows)
        self.offsets = nn.Parameter(torch.zeros(units))

    def mix(self, hidden: Tensor, entropy: Tensor) -> Mixture:
        """Coefficients `w [1; gelu(V n(h) + o)]` (..., 1 + H) for hidden states (..., D)."""
        assert self.reads is not None
        normed = self.normed(hidden)
        units = F.gelu(F.linear(normed, self.reads[0].to(normed.dtype), self.offsets.to(normed.dtype)))
        ones, weight = torch.ones_like(units[..., :1]), self.gate_weight(entropy.to(normed.dtype))
        return Mixture(torch.cat([ones, units], -1) * weight.unsqueeze(-1), weight, Routing(ones, ones))


@dataclass(frozen=True)
class Candidates(Columns):
    """The base's top K tokens of the support for each token of a source, and what is left beside them.

    column (T, K) int64, their places in the support; log_prob (T, K) float32 under the base, falling; rest (T,)
    float64, the log of the probability that all other tokens have together, -inf for none; target (T,) int64, which of
    them is the realised token, -1 for none; target_log_prob (T,) float32, its log-probability under the base.
    """

    column: Tensor
    log_prob: Tensor
    rest: Tensor
    target: Tensor
    target_log_prob: Tensor
    SHARED: ClassVar[frozenset[str]] = frozenset()

    def __len__(self) -> int:
        return len(self.target)


@torch.no_grad()
def candidates_of(source: FeatureSource, head: Head, logits: BaseLogits, top: int) -> Candidates:
    """The candidates of all tokens of a source with these base logits, a chunk at a time."""
    top = min(top, len(source.support))
    parts = []
    for batch, logits_TM in in_chunks(source, head, logits):
        value_TK, column_TK = logits_TM.topk(top, -1)
        left_TM = logits_TM.scatter(-1, column_TK, -math.inf)
        rest_T = torch.logaddexp(batch.rest.log_sum_exp, left_TM.logsumexp(-1).double()) - batch.log_partition
        is_target_TK = column_TK == batch.column[:, None]  # no column is -1, which a target off the support has
        parts.append(
            Candidates(
                column_TK,
                (value_TK.double() - batch.log_partition[:, None]).float(),
                rest_T,
                torch.where(is_target_TK.any(-1), is_target_TK.int().argmax(-1), -1),
                (batch.logit.double() - batch.log_partition).float(),
            )
        )
    return joined(parts)


def in_chunks(source: FeatureSource, head: Head, logits: BaseLogits) -> Iterator[tuple[Features, Tensor]]:
    """A source's tokens with their base logits (T, M), which may be overwritten, a chunk at a time."""
    for rows in even_slices(len(source), UPDATE.rows(len(source.support), head.device)):
        index = torch.arange(rows.start, min(rows.stop, len(source)))
        batch = source.at(index).to(head.device)
        yield batch, logits.of(index, batch)(slice(None))


class Choice(nn.Module):
    """Moves the log-probabilities of K candidates, by the formula of `choice` above; a fresh one moves nothing."""

    def __init__(self, rows_MD: Tensor, mean_D: Tensor, scale_D: Tensor, top: int, units: int = UNITS) -> None:
        """`rows_MD` are the output embedding's rows of the support; mean and scale (D,) are of the hidden states."""
        super().__init__()
        size = rows_MD.shape[-1]
        self.reads = nn.Parameter(torch.randn(units, size) / math.sqrt(size))
        self.offsets = nn.Parameter(torch.zeros(units))
        self.writes = nn.Parameter(torch.zeros(1 + units, size))
        self.judges = nn.Parameter(torch.zeros(1 + units, top + 1))
        self._rows_MD, self._mean_D, self._scale_D = rows_MD, mean_D, scale_D

    def forward(self, hidden_TD: Tensor, column_TK: Tensor, log_prob_TK: Tensor) -> Tensor:
        """The moves (T, K)."""
        normed_TD = (hidden_TD - self._mean_D) / self._scale_D
        units_TH = F.gelu(F.linear(normed_TD, self.reads, self.offsets))
        units_TH = torch.cat([torch.ones_like(units_TH[:, :1]), units_TH], -1)
        by_embedding_TK = torch.einsum("tkd,td->tk", self._rows_MD[column_TK], units_TH @ self.writes)
        judged = units_TH @ self.judges
        return by_embedding_TK + judged[:, :-1] + judged[:, -1:] * log_prob_TK.clamp(min=_LOWEST) / 5


def choice_log_prob(moved_TK: Tensor, candidates: Candidates) -> Tensor:
    """Log-probabilities (T,) of the realised tokens where the candidates' are `moved_TK`, before normalisation."""
    log_partition_T = torch.logaddexp(candidates.rest.to(moved_TK.dtype), moved_TK.logsumexp(-1))
    chosen_T = moved_TK.gather(-1, candidates.target.clamp(min=0)[:, None]).squeeze(-1)
    kept_T = candidates.target_log_prob.to(moved_TK.dtype)
    return torch.where(candidates.target >= 0, chosen_T, kept_T) - log_partition_T


@dataclass(frozen=True)
class Seen:
    """Of each token (T,): its negative log-likelihood in nats, and whether it is the likeliest of the support."""

    nll: Tensor
    picked: Tensor


@torch.no_grad()
def choice_seen(choice: Choice, source: FeatureSource, candidates: Candidates, size: int = 4096) -> Seen:
    """What the choice makes of all tokens of a source."""
    parts = []
    for index in torch.arange(len(source)).split(size):
        some = candidates.at(index)
        moved_TK = some.log_prob + choice(_hidden(source, index, some), some.column, some.log_prob)
        parts.append((-choice_log_prob(moved_TK, some), moved_TK.argmax(-1) == some.target))
    nll, picked = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Seen(nll, picked)


@dataclass(frozen=True)
class ChoiceData:
    """The tokens that a choice is trained on, and those that tell it when to stop, with their candidates."""

    train: FeatureSource
    train_candidates: Candidates
    stop: FeatureSource
    stop_candidates: Candidates


def fit_choice(choice: Choice, data: ChoiceData, config: SFTConfig, description: str) -> tuple[float, int]:
    """Trains in place, by AdamW at rates that fall to 0; keeps the best epoch. Returns its loss and number.

    Number 0 is the fresh one. Of the config it has the seed, epochs, tokens in a batch, and the rates of linear
    experts and of what they read.
    """
    (of_writing, of_reading), epochs, batch_tokens = config.rates_of("linear"), config.epochs, config.batch_tokens
    writing, reading = [choice.writes, choice.judges], [choice.reads, choice.offsets]
    optimizer = torch.optim.AdamW(
        [{"params": writing, "top": of_writing}, {"params": reading, "top": of_reading}], weight_decay=0.0
    )
    per_epoch = -(-len(data.train) // batch_tokens)
    best, at, state = _stop_nll(choice, data), 0, _copied(choice)
    with meter(description, epochs * len(data.train), "tokens") as bar:
        for step, index in enumerate(batches(len(data.train), batch_tokens, epochs, config.seed)):
            for group in optimizer.param_groups:
                group["lr"] = group["top"] * (1 - step / (epochs * per_epoch))
            _step(choice, data, index, optimizer)
            bar.advance(len(index))
            if (step + 1) % per_epoch == 0 and (nll := _stop_nll(choice, data)) < best:
                best, at, state = nll, (step + 1) // per_epoch, _copied(choice)
                bar.note(f"held-out {nll:.3f}")
    choice.load_state_dict(state)
    return best, at


def _copied(choice: Choice) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in choice.state_dict().items()}


def _stop_nll(choice: Choice, data: ChoiceData) -> float:
    return float(choice_seen(choice, data.stop, data.stop_candidates).nll.double().mean())


def _step(choice: Choice, data: ChoiceData, index: Tensor, optimizer: torch.optim.Optimizer) -> None:
    some = data.train_candidates.at(index)
    moved_TK = some.log_prob + choice(_hidden(data.train, index, some), some.column, some.log_prob)
    optimizer.zero_grad()
    (-choice_log_prob(moved_TK, some).mean()).backward()
    nn.utils.clip_grad_norm_(choice.parameters(), MAX_GRAD_NORM)
    optimizer.step()


def _hidden(source: FeatureSource, index: Tensor, some: Candidates) -> Tensor:
    return source.at(index).hidden.to(some.log_prob.device, torch.float32)
