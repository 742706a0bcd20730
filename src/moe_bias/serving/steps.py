"""A step of vLLM's second runner: the head runs first, and whose its rows are is told afterwards.

The head runs once for all rows. What processes logits may run several times in a step, each time for the next rows:
drafts are verified some requests at a time where their logits would take too much memory.

Shapes: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from moe_bias.backbone import HeadTransform


@dataclass(frozen=True)
class HeadRows:
    """What the head read and gave: hidden states (B, D), and the base's entropies (B,) in nats and its soft-cap.

    `logits` (B, V) are the base's, before anything changed them, where they are asked for later.
    """

    hidden_BD: Tensor
    entropy_B: Tensor
    transform: HeadTransform
    logits_BV: Tensor | None

    def __len__(self) -> int:
        return len(self.hidden_BD)

    def __getitem__(self, rows: slice) -> HeadRows:
        logits_BV = None if self.logits_BV is None else self.logits_BV[rows]
        return HeadRows(self.hidden_BD[rows], self.entropy_B[rows], self.transform, logits_BV)


class StepRows:
    """The rows of one step, given out in their order."""

    def __init__(self, rows: HeadRows) -> None:
        self._rows, self._given = rows, 0

    def next(self, count: int) -> HeadRows:
        """The next `count` rows."""
        start, self._given = self._given, self._given + count
        assert self._given <= len(self._rows), "rows of logits are not those that the model's head gave"
        return self._rows[start : self._given]


def slots_of_rows(context: LogitsContext) -> list[int]:
    """The slot of each row's request. Waits for the device where a request may have several rows, else not."""
    # vLLM keeps a copy for the machine of the requests' slots alone; where each has one row, it uses them for the rows.
    if context.expanded_idx_mapping is context.idx_mapping:
        return [int(slot) for slot in context.idx_mapping_np]
    return [int(slot) for slot in context.expanded_idx_mapping.tolist()]


def may_verify_in_parts(config: VllmConfig) -> bool:
    """Whether vLLM may process the logits of a step in several parts: it leaves out parts that need no processing."""
    speculation = config.speculative_config
    if speculation is None:
        return False
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

    largest = config.scheduler_config.max_num_seqs * (1 + speculation.num_speculative_tokens)
    return bool(largest > get_max_chunk_logits(config.model_config.get_vocab_size()))
