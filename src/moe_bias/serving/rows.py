"""Which rows of a batch belong to which adapter, and moving their logits.

Shapes: B rows of the batch, R those of one tenant, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe_bias.backbone import HeadTransform, adapted_logits
from moe_bias.layer import MoEBiasLayer, at_least_float32, entropy_from_logits


@dataclass(frozen=True)
class Tenant:
    """What a request asked for: a version of an adapter and a strength. Equal ones share their work."""

    version: Path
    strength: float
    layer: MoEBiasLayer = field(compare=False)


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
    """Overwrites the tenants' rows of final logits as their layers move them; other rows keep their bits.

    `entropy_B` are the base's entropies in nats (None: of the logits as they are). Tokens at -inf, where
    a grammar's mask puts them, stay there.
    """
    for group in groups:
        logits_RV = at_least_float32(logits_BV[group.row_R])
        entropy_R = entropy_from_logits(logits_RV) if entropy_B is None else entropy_B[group.row_R]
        hidden_RD = hidden_BD[group.row_R]
        tenant = group.tenant
        adapted_RV = adapted_logits(tenant.layer, transform, hidden_RD, entropy_R, logits_RV, tenant.strength)
        if transform.cap is not None:
            adapted_RV = torch.where(logits_RV == -torch.inf, logits_RV, adapted_RV)
        logits_BV.index_copy_(0, group.row_R, adapted_RV.to(logits_BV.dtype))
