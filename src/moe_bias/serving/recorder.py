"""Keeping what training needs of the tokens that requests sample, on the engine's side.

Base entropy, log Z, R and A are taken from the final logits before they are moved, the policy's entropy
after, both before the engine draws. Row t of a request's file is written when t tokens of it have been
sampled, or under speculative decoding drafted. A row that no token was drawn from, such as that of a part
of a prompt or of a draft that was rejected, is not written, or a later step writes over it.

Shapes: B rows of the batch, R those of one group, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.serving.recording import RecordFile
from moe_bias.support import VocabularySplit, at_temperature, scalars_at_temperature, split_vocabulary

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """A request that is recorded; `layer` is the one that moves its logits.

    Hidden states are wanted of tokens at which the policy's entropy is at least `above` nats. `tokens` is the first
    runner's own list of those sampled so far, which grows.
    """

    layer: MoEBiasLayer
    temperature: float
    file: RecordFile
    above: float = -math.inf
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class RecordedRows:
    """Recordings that share layer and temperature by their rows, (R,) int64, and the vocabulary as scalars split it."""

    recordings: dict[int, Recording]
    row_R: Tensor
    temperature: float
    split: VocabularySplit


def recorded_rows(recordings: Mapping[int, Recording], vocab_size: int, device: torch.device) -> list[RecordedRows]:
    """The batch's recordings, group by group; `recordings` has the row numbers."""
    groups: dict[tuple[MoEBiasLayer, float], list[int]] = {}
    for row, recording in sorted(recordings.items()):
        groups.setdefault((recording.layer, recording.temperature), []).append(row)
    return [
        RecordedRows(
            {row: recordings[row] for row in rows},
            torch.tensor(rows, device=device),
            temperature,
            split_vocabulary(layer.support_or_all().to(device), vocab_size),
        )
        for (layer, temperature), rows in groups.items()
    ]


@contextmanager
def recorded(
    groups: Sequence[RecordedRows],
    place_of: Callable[[int], int],
    hidden_BD: Tensor,
    base_BV: Tensor,
    logits_BV: Tensor,
) -> Iterator[None]:
    """Writes the rows of a step, each at its place in its file: `base_BV` are the base's logits.

    `logits_BV`, which may be the same, are the policy's on exit.
    """
    bases = [scalars_at_temperature(base_BV[group.row_R], group.temperature, group.split) for group in groups]
    yield
    for group, base in zip(groups, bases, strict=True):
        policy_R = entropy_from_logits(at_temperature(logits_BV[group.row_R], group.temperature))
        columns = (base.entropy, base.log_partition, base.rest.log_sum_exp, base.rest.mean_logit)
        place_R = [place_of(row) for row in group.recordings]
        ordinal_R = torch.tensor(place_R, device=logits_BV.device) + 1
        scalars_RK = torch.stack([column.double() for column in (ordinal_R, *columns, policy_R)], dim=-1)
        recordings_R = list(group.recordings.values())
        rows_R = recordings_R[0].file.layout.packed(scalars_RK, hidden_BD[group.row_R])
        for recording, place, row in zip(recordings_R, place_R, rows_R, strict=True):
            _write(recording.file, place, row, bool(row["scalars"][-1] >= recording.above))


def _write(file: RecordFile, place: int, row: np.void, with_hidden: bool) -> None:
    """An engine serves others too: what a client's file does not take is told in the log, and seen by the client."""
    try:
        file.write(place, row, with_hidden)
    except OSError as error:
        _LOG.warning("a record file does not take row %d: %s", place, error.strerror)
