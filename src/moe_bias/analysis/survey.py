"""One layer over one text, part by part: what is counted, and the tokens worth a look.

A text may be larger than memory: its parts are read from their files one after the other. What grows with it
is 4 bytes a token of base entropies and as many of the layer's, which the two thresholds are taken over.

The high stratum is the top rho of base entropy over the whole text, ties included. Overlap (entropy patterns,
arXiv 2506.01939) is the share of those tokens that are also in the top rho of the adapted
model's entropy on the same text.

Shapes: T tokens, D hidden, E experts, V vocabulary, G groups of examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bias.analysis.moments import Strongest, moment_at
from moe_bias.analysis.readings import TokenReadings, read_features, read_tokens
from moe_bias.analysis.tally import GROUPS, Tally, TokenFacts
from moe_bias.backbone import Head
from moe_bias.chunks import READINGS
from moe_bias.features.extract import Features
from moe_bias.features.store import FeatureStore
from moe_bias.layer import MoEBiasLayer
from moe_bias.progress import Meter, meter
from moe_bias.support import RHO, fork_threshold


@dataclass(frozen=True)
class Text:
    """Tokens to look at: those of a store, or in memory; `rows` (N,) int64 names the examples, None means all."""

    source: FeatureStore | Features
    rows: Tensor | None = None

    def parts(self) -> Iterator[Features]:
        """The tokens in order, whole examples in each part."""
        for part in self.source.parts():
            found = part if self.rows is None else part.at(torch.isin(part.example, self.rows))
            if len(found):
                yield found


@dataclass(frozen=True)
class Marks:
    """What divides a text, the same for every layer: base entropies (T,), rho, tau in nats, classes of tokens (V,).

    `examples` says how many there are.
    """

    examples: int
    entropy: Tensor
    rho: float
    threshold: float
    kinds: Tensor


@dataclass(frozen=True)
class Survey:
    """The counts; flipped tokens of largest KL; for each expert the tokens it acts on most; adapted entropies (T,)."""

    tally: Tally
    flips: Strongest
    contexts: list[Strongest]
    adapted_entropy: Tensor


@dataclass(frozen=True)
class Overlap:
    """By group of examples, (G,): tokens in the top rho of both models, and in that of the base."""

    both: Tensor
    high: Tensor


def mark(text: Text, kinds_V: Tensor, rho: float = RHO) -> Marks:
    """Reads the entropies alone. Raises UserError where the text has no tokens."""
    examples, entropies = 0, [torch.empty(0)]
    for part in text.parts():
        examples += len(part.example.unique())
        entropies.append(part.entropy.float().clone())
    entropy_T = torch.cat(entropies)
    return Marks(examples, entropy_T, rho, fork_threshold(entropy_T, rho), kinds_V)


def survey(
    layer: MoEBiasLayer, head: Head, text: Text, marks: Marks, flips: int, contexts: int, description: str
) -> Survey:
    """Reads every token once; keeps `flips` flipped tokens in all and `contexts` tokens by expert."""
    kept = _Kept(layer.config.num_experts, flips, contexts)
    read, first = _Reader(layer, head), 0
    adapted_T = torch.empty(len(marks.entropy))
    with meter(description, len(adapted_T), "tokens") as bar:
        for part in text.parts():
            for readings, start in read.chunks(part, bar):
                rows = slice(start, start + len(readings))
                adapted_T[first + rows.start : first + rows.stop] = readings.adapted_entropy
                kept.add(readings, part, rows, first, marks)
            first += len(part)
    return Survey(kept.tally, kept.flips, kept.contexts, adapted_T)


def overlap(text: Text, marks: Marks, adapted_T: Tensor) -> Overlap:
    """Of the survey's adapted entropies, with the text's base entropies; reads the examples' rows alone."""
    high_T = marks.entropy >= marks.threshold
    both_T = high_T & (adapted_T >= fork_threshold(adapted_T, marks.rho))
    found, first = Overlap(*torch.zeros(2, GROUPS, dtype=torch.float64)), 0
    for part in text.parts():
        group_T, rows = part.example % GROUPS, slice(first, first + len(part))
        found.both.index_add_(0, group_T, both_T[rows].double())
        found.high.index_add_(0, group_T, high_T[rows].double())
        first += len(part)
    return found


class _Reader:
    """Reads a part in chunks: from its scalars where its support is the layer's, else over the whole vocabulary."""

    def __init__(self, layer: MoEBiasLayer, head: Head) -> None:
        self._layer, self._head = layer, head
        self._support_M = layer.support_or_all().cpu()
        self._support_logits = head.columns(self._support_M.to(head.device))

    def chunks(self, part: Features, bar: Meter) -> Iterator[tuple[TokenReadings, int]]:
        """Readings on the CPU, each with the row of the part that it starts at."""
        rows = READINGS.rows(len(self._support_M), self._head.device)
        fits = torch.equal(part.support, self._support_M)
        for start in range(0, len(part), rows):
            chunk = part.at(slice(start, start + rows)).to(self._head.device)
            yield (self._reduced(chunk) if fits else self._whole(chunk)).to("cpu"), start
            bar.advance(len(chunk))

    def _reduced(self, chunk: Features) -> TokenReadings:
        return read_features(self._layer, self._head, chunk, self._support_logits)

    def _whole(self, chunk: Features) -> TokenReadings:
        return read_tokens(self._layer, self._head, chunk.hidden, chunk.token)


class _Kept:
    """What is gathered while the text streams by."""

    def __init__(self, num_experts: int, flips: int, contexts: int) -> None:
        self.tally = Tally.empty(num_experts)
        self.flips = Strongest(flips)
        self.contexts = [Strongest(contexts)] * num_experts

    def add(self, readings: TokenReadings, part: Features, rows: slice, first: int, marks: Marks) -> None:
        """One chunk: `rows` of the part, whose first token is the text's token `first`."""
        token_T, is_high_T = part.token[rows], part.entropy[rows] >= marks.threshold
        facts = TokenFacts(part.example[rows], part.position[rows], token_T, marks.kinds[token_T], is_high_T)
        self.tally += Tally.of(readings, facts, len(self.contexts))
        kl_T = readings.kl.masked_fill(~readings.flipped, -torch.inf)
        self.flips = self._more(self.flips, kl_T, readings, part, rows.start, first)
        share_TK = readings.gates * readings.weight[:, None]
        for expert, strongest in enumerate(self.contexts):
            share_T = share_TK.masked_fill(readings.experts != expert, -torch.inf).amax(-1)
            self.contexts[expert] = self._more(strongest, share_T, readings, part, rows.start, first)

    def _more(
        self, strongest: Strongest, score_T: Tensor, readings: TokenReadings, part: Features, start: int, first: int
    ) -> Strongest:
        return strongest.with_more(
            [
                moment_at(part, start + row, readings, row, float(score_T[row]), first + start + row)
                for row in strongest.candidates(score_T)
            ]
        )
