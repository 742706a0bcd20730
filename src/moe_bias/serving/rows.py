"""Which rows of a batch belong to which adapter, and moving their logits.

Shapes: B rows of the batch, R those of one tenant, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe_bias.backbone import HeadTransform
from moe_bias.combined import Part, summed_move
from moe_bias.layer import MoEBiasLayer, at_least_float32, entropy_in_pieces, in_type


@dataclass(frozen=True)
class AskedAdapter:
    """A version of an adapter, and the strength that it is applied with."""

    version: Path
    strength: float
    layer: MoEBiasLayer = field(compare=False)


@dataclass(frozen=True)
class Tenant:
    """What a request asked for: one adapter or several, whose biases add. Equal ones share their work."""

    adapters: tuple[AskedAdapter, ...]

    @property
    def parts(self) -> list[Part]:
        """The layers with their strengths."""
        return [(adapter.layer, adapter.strength) for adapter in self.adapters]


@dataclass(frozen=True)
class TenantRows:
    """A tenant's rows (R,) int64 in the batch."""

    tenant: Tenant
    row_R: Tensor


def rows_by_tenant(tenants: Mapping[int, Tenant], device: torch.device) -> list[TenantRows]:
    """The batch's rows, tenant by tenant; `tenants` has the row numbers. Does not wait for the device."""
    rows: dict[Tenant, list[int]] = {}
    for row, tenant in sorted(tenants.items()):
        rows.setdefault(tenant, []).append(row)
    return [TenantRows(tenant, torch.tensor(numbers).to(device, non_blocking=True)) for tenant, numbers in rows.items()]


def move_rows(
    logits_BV: Tensor,
    hidden_BD: Tensor,
    groups: Sequence[TenantRows],
    transform: HeadTransform,
    entropy_B: Tensor | None = None,
) -> None:
    """Moves the final logits of the tenants' rows, in place and on their supports; all others keep their bits.

    `entropy_B` are the base's entropies in nats (None: of the logits as they are). Tokens at -inf, where
    a grammar's mask puts them, stay there. `combined.summed_logits` is the plain reference.
    """
    for group in groups:
        row_R = group.row_R
        entropy_R = _entropies(logits_BV, row_R) if entropy_B is None else entropy_B[row_R]
        move = summed_move(group.tenant.parts, hidden_BD[row_R], entropy_R)
        moved = row_R if move.support is None else (row_R[:, None], move.support)
        logits_RM = at_least_float32(logits_BV[moved])
        adapted_RM = logits_RM + transform.reachable(logits_RM, move.amount)
        if transform.cap is not None:
            adapted_RM = torch.where(logits_RM == -torch.inf, logits_RM, adapted_RM)
        logits_BV[moved] = in_type(adapted_RM, logits_BV.dtype)


def _entropies(logits_BV: Tensor, row_R: Tensor) -> Tensor:
    return entropy_in_pieces(row_R, logits_BV.shape[-1], lambda piece: logits_BV[piece])
