"""What the frozen model says of the tokens that a trainer scores, kept by the row of the batch that they stand in.

TRL's trainers bring a row again in every epoch, in every pass over sampled answers and for the reference model. A row
is the same where its tokens, its padding on the left, their positions and which of them are scored are the same: then
the backbone is not run again.

Shapes: B rows, L positions, T scored tokens, C a chunk of them, D hidden, V vocabulary, M support, R the rest.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_bias.backbone import Head, captured_hidden
from moe_bias.columns import Columns, joined
from moe_bias.features.extract import Features, chunk_rows, place_in_example, support_columns
from moe_bias.support import VocabularySplit, at_temperature, scalars_at_temperature, split_vocabulary

_log = logging.getLogger(__name__)
Inputs = Mapping[str, Any]
"""What a model's forward takes by name."""


@dataclass(frozen=True)
class Seen(Columns):
    """Scored tokens: their features with `logit` and scalars of u = z / T, the entropy at temperature 1; and of u

    `rest_largest` (T,) off the support, -inf where there is nothing; `rest_squares` (T,) float64, the log of the sum
    of exp(2 u) there; `mean_logit` (T,) over the vocabulary.
    """

    features: Features
    rest_largest: Tensor
    rest_squares: Tensor
    mean_logit: Tensor

    def __len__(self) -> int:
        return len(self.features)

    @property
    def nbytes(self) -> int:
        """What they take in memory, about."""
        return self.features.hidden.nbytes + 100 * len(self)


class RowStates:
    """The tokens of rows, computed once where `budget` bytes hold them; the rows that came first stay.

    Scalars are those at `temperature` on a support (M,), which `begin` sets.
    """

    def __init__(self, model: PreTrainedModel, head: Head, temperature: float, budget: int) -> None:
        self.computed = 0
        """Rows that the backbone was run on."""
        self._model, self._head, self._temperature, self._budget = model, head, temperature, budget
        self._kept: OrderedDict[bytes, Seen] = OrderedDict()
        self._bytes, self._is_full = 0, False

    def begin(self, support_M: Tensor) -> None:
        """Takes scalars on this support from here on, and forgets those on another."""
        self._support_M = support_M.to(self._head.device)
        self._split = split_vocabulary(self._support_M, self._head.vocab_size)
        self._columns_V = support_columns(support_M.cpu(), self._head.vocab_size).to(self._head.device)
        self.forget()

    def forget(self) -> None:
        """Gives the memory back; the backbone is run again on whatever comes."""
        self._kept.clear()
        self._bytes, self._is_full = 0, False

    def of(self, inputs: Inputs, scored_BL: Tensor, next_BL: Tensor) -> Seen:
        """The scored tokens of all rows, row after row.

        `scored_BL` marks the positions after which a token is scored, `next_BL` are those tokens.
        """
        keys = _keys(inputs, scored_BL, next_BL)
        new = [row for row, key in enumerate(keys) if key not in self._kept]
        found = self._computed(inputs, scored_BL, next_BL, new) if new else {}
        seen = [found[row] if row in found else self._kept[key] for row, key in enumerate(keys)]
        for row in new:
            self._keep(keys[row], found[row])
        return joined(seen)

    def hidden_of(self, inputs: Inputs, scored_BL: Tensor, next_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (T, D) before the scored tokens and the tokens (T,), before there is a support."""
        hidden_BLD = self._hidden(inputs, list(range(len(scored_BL))), len(scored_BL))
        return hidden_BLD[:, : scored_BL.shape[1]][scored_BL], next_BL[scored_BL]

    def _keep(self, key: bytes, seen: Seen) -> None:
        if self._bytes + seen.nbytes <= self._budget:
            self._kept[key] = seen
            self._bytes += seen.nbytes
        elif not self._is_full:
            self._is_full = True
            _log.warning(
                "hidden states of %s rows fill `states_memory`, %s bytes; the backbone is run for all others in every "
                "epoch: give more memory",
                f"{len(self._kept):,}",
                f"{self._budget:,}",
            )

    @torch.no_grad()
    def _computed(self, inputs: Inputs, scored_BL: Tensor, next_BL: Tensor, rows: Sequence[int]) -> dict[int, Seen]:
        self.computed += len(rows)
        hidden_BLD = self._hidden(inputs, rows, len(scored_BL))
        found = {}
        for place, row in enumerate(rows):
            scored_L = scored_BL[row]
            hidden_TD = hidden_BLD[place, : len(scored_L)][scored_L]
            found[row] = self._seen(hidden_TD, next_BL[row][scored_L].to(hidden_TD.device))
        return found

    @torch.no_grad()
    def _hidden(self, inputs: Inputs, rows: Sequence[int], batch: int) -> Tensor:
        """Hidden states (B, L, D) of some rows, in the model's own type and without dropout."""
        given = dict(inputs)
        if len(rows) < batch:
            index = torch.tensor(rows, device=given["input_ids"].device)
            given = {
                name: value[index] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value
                for name, value in given.items()
            }
        device = given["input_ids"].device
        with _evaluating(self._model), torch.autocast(device.type, enabled=False):
            with captured_hidden(self._model) as seen:
                self._model(**{**given, "use_cache": False})
            return seen[0].detach()

    def _seen(self, hidden_TD: Tensor, token_T: Tensor) -> Seen:
        hidden_TD, token_T = hidden_TD.to(self._head.device), token_T.to(self._head.device)
        rows = chunk_rows(self._head)
        parts = [
            self._chunk(hidden_CD, token_C)
            for hidden_CD, token_C in zip(hidden_TD.split(rows), token_T.split(rows), strict=True)
        ]
        return joined(parts)

    def _chunk(self, hidden_CD: Tensor, token_C: Tensor) -> Seen:
        logits_CV = self._head.logits(hidden_CD.to(self._head.dtype))
        u_CV = at_temperature(logits_CV, self._temperature)
        base = scalars_at_temperature(logits_CV, self._temperature, self._split)
        example_C = torch.zeros_like(token_C)
        features = Features(
            hidden_CD,
            token_C,
            example_C,
            place_in_example(example_C.cpu()).to(token_C.device),
            u_CV.gather(-1, token_C[:, None]).squeeze(-1),
            base.entropy,
            base.log_partition,
            base.rest,
            self._columns_V[token_C],
            self._support_M,
        )
        return Seen(features, *_of_rest(u_CV, self._split), u_CV.mean(-1))


def _of_rest(u_CV: Tensor, split: VocabularySplit) -> tuple[Tensor, Tensor]:
    """The largest of the rest, and the log of the sum of its exp(2 u); both -inf where the support is everything."""
    rest_CR = u_CV[:, split.gathered] if split.rest_is_gathered else u_CV + split.penalty.to(u_CV.dtype)
    if rest_CR.shape[-1] == 0:
        empty_C = u_CV.new_full(u_CV.shape[:1], -math.inf)
        return empty_C, empty_C.double()
    return rest_CR.amax(-1), (2 * rest_CR).logsumexp(-1).double()


def _keys(inputs: Inputs, scored_BL: Tensor, next_BL: Tensor) -> list[bytes]:
    """What tells rows apart."""
    input_ids, attention = inputs["input_ids"].cpu(), inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    attended = torch.ones_like(input_ids) if attention is None else attention.cpu()
    scored_BL, next_BL = scored_BL.cpu(), next_BL.cpu()
    keys = []
    for row, ids_L in enumerate(input_ids):
        real_L = attended[row].bool()
        columns = [ids_L[real_L], scored_BL[row].nonzero().squeeze(-1), next_BL[row][scored_BL[row]]]
        if positions is not None:
            columns.append(positions[row].cpu())
        start = real_L.nonzero()[:1].flatten()
        keys.append(b"|".join(column.to(torch.int64).numpy().tobytes() for column in [start, *columns]))
    return keys


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout while the block runs."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
