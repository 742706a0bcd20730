"""One pass of the frozen model: hidden states of the completions, with the scalars training needs.

What is kept of a token t that counts (a completion token): the hidden state that predicts it, its
id and base logit, the base entropy, log Z, the rest scalars R and A (see `support`), which example it
is of and its place there. The backbone is not needed again.

Shapes: T tokens, C a chunk of them, D hidden, V vocabulary, M support.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moe_bias import columns
from moe_bias.backbone import Head, hidden_states, output_embedding
from moe_bias.chunks import LOGITS, longest_first
from moe_bias.columns import Columns
from moe_bias.layer import at_least_float32, entropy_from_logits
from moe_bias.limits import refuse_beyond_memory
from moe_bias.progress import meter
from moe_bias.support import (
    RHO,
    BaseScalars,
    RestScalars,
    VocabularySplit,
    base_scalars,
    choose_support,
    coverage,
    fork_mass,
    fork_threshold,
    split_vocabulary,
)
from moe_bias.tasks.conversations import Example

if TYPE_CHECKING:
    from moe_bias.features.target import TargetTokens

CALIBRATION_TOKENS = 4096
"""Completion tokens of a calibration sample, about."""


@dataclass(frozen=True)
class Features(Columns):
    """What training and measuring read instead of the backbone.

    hidden (T, D) float32, or bfloat16 where a store keeps it so; token, example (T,) int64; position
    (T,) int64, the token's place in its completion; logit, entropy (T,) float32; log_partition (T,)
    and rest: float64; column (T,) int64, the token's place in the support or -1; support (M,) int64.
    `target` is what a second model says of the same tokens, where there is one to come nearer to.
    """

    hidden: Tensor
    token: Tensor
    example: Tensor
    position: Tensor
    logit: Tensor
    entropy: Tensor
    log_partition: Tensor
    rest: RestScalars
    column: Tensor
    support: Tensor
    target: TargetTokens | None = None
    SHARED: ClassVar[frozenset[str]] = frozenset({"support"})

    def __len__(self) -> int:
        return len(self.token)

    def contents(self) -> Iterator[Tensor]:
        """The hidden states."""
        yield self.hidden

    def parts(self) -> Iterator[Features]:
        """All tokens, in one part."""
        yield self


def joined(parts: Sequence[Features]) -> Features:
    """The tokens of all parts, one after the other, examples numbered on; the parts have one support."""
    if len(parts) == 1:
        return parts[0]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + int(part.example.max()) + 1)
    numbered = [replace(part, example=part.example + start) for part, start in zip(parts, starts, strict=False)]
    return columns.joined(numbered)


@dataclass(frozen=True)
class HiddenTokens:
    """Hidden states (T, D) float32 of completion tokens, the tokens (T,) and their examples (T,)."""

    hidden: Tensor
    token: Tensor
    example: Tensor


def run_backbone(model: nn.Module, examples: Sequence[Example], batch_size: int, description: str) -> HiddenTokens:
    """Runs the backbone over the examples and keeps the hidden states that predict completion tokens."""
    parts: dict[int, Tensor] = {}
    with meter(description, sum(len(example) for example in examples), "tokens") as bar:
        for batch in longest_first(examples, batch_size):
            refuse_batch_beyond_memory(model, [examples[i] for i in batch])
            for index, hidden_TD in zip(batch, completion_hidden(model, [examples[i] for i in batch]), strict=True):
                parts[index] = at_least_float32(hidden_TD).cpu()
            bar.advance(sum(len(examples[i]) for i in batch))
    tokens = [torch.tensor(example.completion_ids) for example in examples]
    numbers = torch.arange(len(examples)).repeat_interleave(torch.tensor([len(part) for part in tokens]))
    return HiddenTokens(torch.cat([parts[index] for index in range(len(examples))]), torch.cat(tokens), numbers)


def refuse_batch_beyond_memory(model: nn.Module, examples: Sequence[Example]) -> None:
    """Raises UserError where not even one layer's states of a batch, a few times over, fit into the machine."""
    longest = max(map(len, examples))
    head: Any = output_embedding(model)
    refuse_beyond_memory(
        4 * 4 * len(examples) * longest * int(head.in_features),
        f"{len(examples):,} examples of up to {longest:,} tokens in one forward pass",
        "lower `batch_size` or `max_length`",
    )


def with_scalars(head: Head, tokens: HiddenTokens, support: Sequence[int], description: str) -> Features:
    """Adds what only the full vocabulary gives, a chunk of tokens at a time."""
    split = split_vocabulary(torch.tensor(support, device=head.device), head.vocab_size)
    parts = []
    with meter(description, len(tokens.token), "tokens") as bar:
        for rows in torch.arange(len(tokens.token)).split(chunk_rows(head)):
            hidden_TD = tokens.hidden[rows].to(head.device)
            parts.append(token_scalars(head, hidden_TD, tokens.token[rows].to(head.device), split))
            bar.advance(len(rows))
    return _features(tokens, columns.joined(parts), torch.tensor(support), head.vocab_size)


def answer_features(head: Head, hidden_TD: Tensor, token_T: Tensor, support_M: Tensor) -> Features:
    """Features of one answer on a support (M,), on the CPU, from the hidden states that predict its tokens."""
    split = split_vocabulary(support_M.to(head.device), head.vocab_size)
    scalars = token_scalars(head, hidden_TD.to(head.device), token_T.to(head.device), split)
    tokens = HiddenTokens(at_least_float32(hidden_TD).cpu(), token_T.cpu(), torch.zeros_like(token_T, device="cpu"))
    return _features(tokens, scalars, support_M.cpu(), head.vocab_size)


def _features(tokens: HiddenTokens, scalars: TokenScalars, support_M: Tensor, vocab_size: int) -> Features:
    return Features(
        tokens.hidden,
        tokens.token,
        tokens.example,
        place_in_example(tokens.example),
        scalars.logit,
        scalars.base.entropy,
        scalars.base.log_partition,
        scalars.base.rest,
        support_columns(support_M, vocab_size)[tokens.token],
        support_M,
    )


@dataclass(frozen=True)
class TokenScalars(Columns):
    """The realised tokens' base logits (T,) float32, and the base distribution's scalars; on the CPU."""

    logit: Tensor
    base: BaseScalars


@torch.no_grad()
def token_scalars(head: Head, hidden_TD: Tensor, token_T: Tensor, split: VocabularySplit) -> TokenScalars:
    """Scalars of hidden states and tokens on the head's device, logits held for a chunk of them at a time."""
    rows = chunk_rows(head)
    parts = []
    for hidden_CD, token_C in zip(hidden_TD.split(rows), token_T.split(rows), strict=True):
        logits_CV = head.logits(hidden_CD.to(head.dtype))
        logit_C = logits_CV.gather(-1, token_C[:, None]).squeeze(-1)
        parts.append(TokenScalars(logit_C, base_scalars(logits_CV, split)))
    return columns.joined(parts).to("cpu")


def chunk_rows(head: Head) -> int:
    """Tokens whose full-vocabulary logits are held at once."""
    return LOGITS.rows(head.vocab_size, head.device)


def support_columns(support_M: Tensor, vocab_size: int) -> Tensor:
    """(V,) int64: each token's place in the support, -1 off it."""
    column_V = torch.full((vocab_size,), -1)
    column_V[support_M] = torch.arange(len(support_M))
    return column_V


def place_in_example(example_T: Tensor) -> Tensor:
    """(T,) int64: how many tokens of the same example stand before each; an example's tokens stand together."""
    counts: Tensor = example_T.unique_consecutive(return_counts=True)[1]
    return torch.arange(len(example_T)) - (counts.cumsum(0) - counts).repeat_interleave(counts)


@dataclass(frozen=True)
class ForkMass:
    """The base's probability mass per token id at forks, (V,) float64, with the threshold in nats."""

    mass: Tensor
    threshold: float


@torch.no_grad()
def measure_fork_mass(head: Head, hidden_TD: Tensor, rho: float = RHO) -> ForkMass:
    """Fork mass over the given hidden states; forks are the top share rho of them by base entropy."""
    threshold = fork_threshold(base_entropies(head, hidden_TD), rho)
    mass_V = torch.zeros(head.vocab_size, dtype=torch.float64, device=head.device)
    for chunk in hidden_TD.split(chunk_rows(head)):
        mass_V += fork_mass(head.logits(chunk.to(head.device, head.dtype)), threshold)
    return ForkMass(mass_V.cpu(), threshold)


@torch.no_grad()
def base_entropies(head: Head, hidden_TD: Tensor) -> Tensor:
    """Base entropy (T,) in nats of each hidden state, on the CPU."""
    chunks = hidden_TD.split(chunk_rows(head))
    return torch.cat([entropy_from_logits(head.logits(chunk.to(head.device, head.dtype))).cpu() for chunk in chunks])


def evenly_spaced(lengths: Sequence[int], tokens: int = CALIBRATION_TOKENS) -> list[int]:
    """A calibration sample: indices evenly spaced over examples of these lengths, of about `tokens` together."""
    total = sum(lengths)
    count = min(max(-(-tokens * len(lengths) // max(total, 1)), 1), len(lengths))
    return [index * len(lengths) // count for index in range(count)]


def support_for(forks: ForkMass, targets: Tensor, size: int, always: Sequence[int]) -> list[int]:
    """A support of `size` ids: `always`, then training targets by frequency, then by fork mass."""
    counts = targets.bincount(minlength=len(forks.mass))
    frequent = counts.argsort(descending=True, stable=True)[: max(size - len(set(always)), 0)].tolist()
    needed = set(always) | {token for token in frequent if counts[token] > 0}
    return choose_support(forks.mass, size, sorted(needed))


def fork_coverage(forks: ForkMass, support: Sequence[int]) -> float:
    """The share of held-out fork mass that the support holds."""
    return coverage(forks.mass, support)


def completion_hidden(model: nn.Module, examples: Sequence[Example]) -> Iterator[Tensor]:
    """For each example, hidden states (T, D) at the positions that predict its completion, as the model has them."""
    device = next(model.parameters()).device
    rows = [torch.tensor(example.prompt_ids + example.completion_ids) for example in examples]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    hidden_BLD = hidden_states(model, input_ids.to(device), mask.to(device))
    for hidden_LD, example, length in zip(hidden_BLD, examples, lengths.tolist(), strict=True):
        yield hidden_LD[len(example.prompt_ids) - 1 : length - 1]
