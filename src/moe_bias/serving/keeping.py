"""Keeping hidden states of a request's positions, on the engine's side: what teaching an answer needs of it.

`SamplingParams.extra_args` has [NAME, START, ROWS] in `moe_bias_keep`: a record file (see `recording`) in the folder
that is shared with the process that learns, whose row t is for the state after position START + t; of the scalars it
has the ordinal alone. States of an answer are what the head is called with, a row a step. Those of a prompt are seen
in the forward pass itself, of all positions that are computed: those whose keys and values were there already are
not, and their rows stay empty.

Shapes: N positions of a step, B rows of the batch, P positions of one request, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.forward_context import get_forward_context

from moe_bias.mistakes import UserError, reason_of
from moe_bias.serving.recording import SCALARS, RecordFile, Spool

KEEP = "moe_bias_keep"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeping:
    """A request whose states are kept: the file, the position of its first row, and tokens of the prompt.

    `tokens` is the first runner's own list of those sampled so far, which grows.
    """

    file: RecordFile
    start: int
    prompt: int
    tokens: Sequence[int] = ()

    @property
    def next_position(self) -> int:
        """The position that the first runner's next token is drawn after."""
        return self.prompt - 1 + len(self.tokens)

    @property
    def of_prompt(self) -> bool:
        """Whether states are wanted that no token is drawn from."""
        return self.start < self.prompt - 1

    def keep(self, positions: Sequence[int], hidden_PD: Tensor) -> None:
        """Writes the states of positions that the file has rows for.

        An engine serves others too: what the file does not take is told in the log, and seen by who reads it.
        """
        places = {row: position - self.start for row, position in enumerate(positions)}
        wanted = {row: place for row, place in places.items() if 0 <= place < self.file.rows}
        if not wanted:
            return
        scalars_PK = torch.zeros(len(wanted), len(SCALARS), dtype=torch.float64)
        scalars_PK[:, 0] = torch.tensor(list(wanted.values())) + 1
        rows = self.file.layout.packed(scalars_PK, hidden_PD[list(wanted)])
        try:
            for place, row in zip(wanted.values(), rows, strict=True):
                self.file.write(place, row)
        except OSError as error:
            _LOG.warning("hidden states are not kept: %s", reason_of(error))


def keeping_of(spool: Spool | None, params: SamplingParams, prompt: int, tokens: Sequence[int] = ()) -> Keeping | None:
    """What is to be kept of a request whose prompt has so many tokens; its file was there when it was admitted."""
    asked = (params.extra_args or {}).get(KEEP)
    if asked is None or spool is None:
        return None
    name, start, rows = asked
    try:
        return Keeping(spool.open(name, rows), start, prompt, tokens)
    except UserError as error:
        _LOG.warning("a request's hidden states are not kept: %s", error)
        return None


def keep_rows(kept: Mapping[int, tuple[Keeping, int]], hidden_BD: Tensor) -> None:
    """Writes rows of a step: of each that is kept, its request's keeping and its position."""
    if kept:
        hidden_RD = hidden_BD[list(kept)].cpu()
        for hidden_1D, (keeping, position) in zip(hidden_RD.split(1), kept.values(), strict=True):
            keeping.keep([position], hidden_1D)


@dataclass(frozen=True)
class Pass:
    """A forward pass: hidden states (N, D), their positions, and where the tokens of each request of it begin."""

    hidden_ND: Tensor
    positions: list[int]
    starts: list[int]

    def keep(self, keepings: Sequence[Keeping | None]) -> None:
        """Writes what is wanted of prompts; `keepings` are of the requests in the pass's order."""
        spans = list(pairwise(self.starts))
        for keeping, (start, end) in zip(keepings, spans[: len(keepings)], strict=True):
            if keeping is not None and keeping.of_prompt:
                keeping.keep(self.positions[start:end], self.hidden_ND[start:end])


class PassReader(Protocol):
    """What follows a model's forward passes."""

    @property
    def wants_passes(self) -> bool:
        """Whether the next one is of interest."""
        ...

    def on_pass(self, seen: Pass) -> None:
        """Sees it."""
        ...


def follow_passes(model: nn.Module, reader: PassReader) -> None:
    """From here on `reader` sees each pass of the model that Python runs, and that it wants.

    Not those of a CUDA graph as a whole, which vLLM has for steps of one token a request; nor those of a model whose
    positions are of several dimensions.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        positions_N, starts = kwargs.get("positions"), _starts() if reader.wants_passes else None
        hidden_ND = output[0] if isinstance(output, tuple) else output
        if starts is not None and positions_N is not None and positions_N.ndim == 1 and isinstance(hidden_ND, Tensor):
            reader.on_pass(Pass(hidden_ND, positions_N.tolist(), starts))

    model.register_forward_hook(hook, with_kwargs=True)


def _starts() -> list[int] | None:
    """Where the tokens of each request begin, and the end of the last, as the attention of the pass is told.

    None in a pass that is of no requests, and where the batch is cut in two.
    """
    attention = get_forward_context().attn_metadata
    if not isinstance(attention, dict):
        return None
    told = (getattr(metadata, "query_start_loc", None) for metadata in attention.values())
    return next((starts.tolist() for starts in told if starts is not None), None)
