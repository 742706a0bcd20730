"""One pass of the frozen model: hidden states of the completions, with the scalars training needs.

What is kept of a token t that counts (a completion token): the hidden state that predicts it, its
id and base logit, the base entropy, the rest scalars R and A (see `support`), and which example it
is of. The backbone is not needed again.

Shapes: T tokens, D hidden, V vocabulary, M support.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_bias.backbone import Head, hidden_states
from moe_bias.layer import at_least_float32, entropy_from_logits
from moe_bias.progress import meter
from moe_bias.support import FORK_SHARE, RestScalars, choose_support, coverage, fork_mass, fork_threshold, rest_scalars
from moe_bias.tasks.conversations import Example

CHUNK_TOKENS = 256
"""Full-vocabulary logits are held for this many tokens at a time."""


@dataclass(frozen=True)
class Features:
    """What training and measuring read instead of the backbone.

    hidden (T, D) float32; token, example (T,) int64; logit, entropy (T,) float32; rest: float64;
    column (T,) int64, the token's place in the support or -1; support (M,) int64.
    """

    hidden: Tensor
    token: Tensor
    example: Tensor
    logit: Tensor
    entropy: Tensor
    rest: RestScalars
    column: Tensor
    support: Tensor

    def __len__(self) -> int:
        return len(self.token)

    def at(self, index: Tensor | slice) -> Features:
        """The given tokens; a slice copies nothing."""
        rest = RestScalars(self.rest.log_sum_exp[index], self.rest.mean_logit[index])
        return Features(
            self.hidden[index],
            self.token[index],
            self.example[index],
            self.logit[index],
            self.entropy[index],
            rest,
            self.column[index],
            self.support,
        )

    def to(self, device: torch.device) -> Features:
        """The same features on a device."""
        rest = RestScalars(self.rest.log_sum_exp.to(device), self.rest.mean_logit.to(device))
        return Features(
            self.hidden.to(device),
            self.token.to(device),
            self.example.to(device),
            self.logit.to(device),
            self.entropy.to(device),
            rest,
            self.column.to(device),
            self.support.to(device),
        )


@dataclass(frozen=True)
class HiddenTokens:
    """Hidden states (T, D) float32 of completion tokens, the tokens (T,) and their examples (T,)."""

    hidden: Tensor
    token: Tensor
    example: Tensor


def batches_by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Indices of examples in batches of like length, longest first, so that memory is seen to fit."""
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def run_backbone(model: nn.Module, examples: Sequence[Example], batch_size: int, description: str) -> HiddenTokens:
    """Runs the backbone over the examples and keeps the hidden states that predict completion tokens."""
    total = sum(len(example.prompt_ids) + len(example.completion_ids) for example in examples)
    parts: dict[int, Tensor] = {}
    with meter(description, total, "tokens") as bar:
        for batch in batches_by_length(examples, batch_size):
            for index, hidden_TD in zip(batch, _completion_hidden(model, [examples[i] for i in batch]), strict=True):
                parts[index] = hidden_TD
            bar.advance(sum(len(examples[i].prompt_ids) + len(examples[i].completion_ids) for i in batch))
    tokens = [torch.tensor(example.completion_ids) for example in examples]
    numbers = torch.arange(len(examples)).repeat_interleave(torch.tensor([len(part) for part in tokens]))
    return HiddenTokens(torch.cat([parts[index] for index in range(len(examples))]), torch.cat(tokens), numbers)


@torch.no_grad()
def with_scalars(head: Head, tokens: HiddenTokens, support: Sequence[int], description: str) -> Features:
    """Adds what only the full vocabulary gives, a chunk of tokens at a time."""
    device = head.device
    support_M = torch.tensor(support, device=device)
    entropies, logits, lses, means = [], [], [], []
    with meter(description, len(tokens.token), "tokens") as bar:
        for chunk in torch.arange(len(tokens.token)).split(CHUNK_TOKENS):
            logits_TV = head.logits(tokens.hidden[chunk].to(device, head.dtype))
            rest = rest_scalars(logits_TV, support_M)
            entropies.append(entropy_from_logits(logits_TV).cpu())
            logits.append(logits_TV.gather(-1, tokens.token[chunk].to(device)[:, None]).squeeze(-1).cpu())
            lses.append(rest.log_sum_exp.cpu())
            means.append(rest.mean_logit.cpu())
            bar.advance(len(chunk))
    rest = RestScalars(torch.cat(lses), torch.cat(means))
    column_V = torch.full((head.vocab_size,), -1)
    column_V[support_M.cpu()] = torch.arange(len(support))
    return Features(
        tokens.hidden,
        tokens.token,
        tokens.example,
        torch.cat(logits),
        torch.cat(entropies),
        rest,
        column_V[tokens.token],
        support_M.cpu(),
    )


@dataclass(frozen=True)
class ForkMass:
    """The base's probability mass per token id at forks, (V,) float64, with the threshold in nats."""

    mass: Tensor
    threshold: float


@torch.no_grad()
def measure_fork_mass(head: Head, hidden_TD: Tensor, share: float = FORK_SHARE) -> ForkMass:
    """Fork mass over the given hidden states; forks are the top `share` of them by base entropy."""
    device = head.device
    chunks = [chunk.to(device, head.dtype) for chunk in hidden_TD.split(CHUNK_TOKENS)]
    threshold = fork_threshold(torch.cat([entropy_from_logits(head.logits(chunk)) for chunk in chunks]), share)
    mass_V = torch.zeros(head.vocab_size, dtype=torch.float64, device=device)
    for chunk in chunks:
        mass_V += fork_mass(head.logits(chunk), threshold)
    return ForkMass(mass_V.cpu(), threshold)


def support_for(forks: ForkMass, targets: Tensor, size: int, always: Sequence[int]) -> list[int]:
    """A support of `size` ids: `always`, then training targets by frequency, then by fork mass."""
    counts = targets.bincount(minlength=len(forks.mass))
    frequent = counts.argsort(descending=True, stable=True)[: max(size - len(set(always)), 0)].tolist()
    needed = set(always) | {token for token in frequent if counts[token] > 0}
    return choose_support(forks.mass, size, sorted(needed))


def fork_coverage(forks: ForkMass, support: Sequence[int]) -> float:
    """The share of held-out fork mass that the support holds."""
    return coverage(forks.mass, support)


def _completion_hidden(model: nn.Module, examples: Sequence[Example]) -> Iterator[Tensor]:
    """For each example, hidden states (T, D) float32 at the positions that predict its completion."""
    device = next(model.parameters()).device
    rows = [torch.tensor(example.prompt_ids + example.completion_ids) for example in examples]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    hidden_BLD = hidden_states(model, input_ids.to(device), mask.to(device))
    for hidden_LD, example, length in zip(hidden_BLD, examples, lengths.tolist(), strict=True):
        first = len(example.prompt_ids) - 1
        yield at_least_float32(hidden_LD[first : length - 1]).cpu()
