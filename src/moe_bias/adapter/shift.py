"""An adapter as a shift of the hidden states, for code that multiplies with the output embedding itself.

Without the entropy gate and free entries, experts that act on the whole vocabulary move the logits by W d of

    d = s / sigma sum_e g_e (c_e + U_e V_e n(h))        sigma: the scale of the model's own head

so W (h + d) are the adapted logits, exactly, whoever computes them: a fused or chunked loss, another engine.
`HiddenShift` is that function of h. `InsertedShift` puts it at the output of a model's backbone and takes it away.

Shapes: C coefficients of the layer's table, D hidden size.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_bias.adapter.head import LastRouting
from moe_bias.backbone import SHIFTED, HeadTransform, backbone_of, output_embedding, unwrapped
from moe_bias.layer import MoEBiasLayer, at_least_float32
from moe_bias.mistakes import UserError


class HiddenShift(nn.Module):
    """`h + d` of hidden states h, by a layer that has this form.

    It costs about `4 E (1 + R) D` operations a token, against `2 V D` of the output embedding, and no entropy. The
    sum is rounded once to the hidden states' type, before the output embedding: in half precision the logits differ
    by that from those that the layer itself moves, which are rounded after it.

    `last` receives the routing of the last forward with gradients, for the load-balance loss.
    """

    def __init__(self, layer: MoEBiasLayer, transform: HeadTransform, last: LastRouting | None = None) -> None:
        """Raises UserError, with the reason, where the layer's effect is no shift of the hidden states."""
        super().__init__()
        self.layer, self.transform = layer, transform
        self.last = LastRouting() if last is None else last
        check_shift(layer, transform)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shifted hidden states (..., D) in the type of `hidden` (..., D). No gradient enters `hidden`."""
        check_shift(self.layer, self.transform)  # where a layer reaches can be changed
        hidden = hidden.detach()
        mixture = self.layer.mix(hidden.to(self.layer.device), hidden.new_zeros(hidden.shape[:-1]))
        self.last.routing = mixture.routing if torch.is_grad_enabled() else None
        vectors_CD = _vectors(self.layer).to(mixture.coefficients.dtype)
        shift = (self.layer.strength / self.transform.scale) * (mixture.coefficients @ vectors_CD)
        return (at_least_float32(hidden) + shift.to(hidden.device)).to(hidden.dtype)


class ShiftOwner(Protocol):
    """Who holds the layer that a model's backbone is shifted by."""

    last: LastRouting
    shift: InsertedShift | None

    @property
    def transform(self) -> HeadTransform:
        """What the model does to logits after its head."""

    def shifting(self) -> MoEBiasLayer | None:
        """The layer that this forward of the backbone is shifted by; None: it stays as it is."""


class InsertedShift:
    """A `HiddenShift` at the output of a model's backbone, until `remove` or the end of a `with` block.

    It follows its owner: another active adapter is applied from the next forward on, a disabled one is not.
    """

    def __init__(self, owner: ShiftOwner, layer: MoEBiasLayer, model: nn.Module) -> None:
        """Raises UserError, leaving the model as it was, where the result would not be that of the adapter."""
        if owner.shift is not None:
            raise UserError("the model's hidden states are shifted already; remove() the first shift")
        backbone = backbone_of(model)
        if backbone is None:
            raise UserError(f"{type(model).__name__} has no separate backbone, whose hidden states could be shifted")
        self._owner = owner
        self._shift = HiddenShift(layer, owner.transform, owner.last)
        self._hook = backbone.register_forward_hook(self._on_backbone_done)
        self._head = unwrapped(output_embedding(model))
        setattr(self._head, SHIFTED, True)
        owner.shift = self
        try:
            check_head_reads(model, backbone)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the shift away: the adapter acts at the output embedding again."""
        self._hook.remove()
        setattr(self._head, SHIFTED, False)
        self._owner.shift = None

    def __enter__(self) -> InsertedShift:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _on_backbone_done(self, backbone: nn.Module, inputs: Any, output: Any) -> Any:
        layer = self._owner.shifting()
        if layer is None:
            return output
        if layer is not self._shift.layer:
            self._shift = HiddenShift(layer, self._owner.transform, self._owner.last)
        return _with_last(output, self._shift(_last_of(output)))


def check_shift(layer: MoEBiasLayer, transform: HeadTransform) -> None:
    """Raises UserError, with the reason, where the layer's effect is no shift of the hidden states."""
    reason = _why_no_shift(layer, transform)
    if reason is not None:
        raise UserError(f"the adapter cannot shift the hidden states: {reason}")


def _why_no_shift(layer: MoEBiasLayer, transform: HeadTransform) -> str | None:
    if layer.directions is None:
        return "free experts move each token by a number of its own; use experts = 'directions' or 'linear'"
    if layer.experts is not None:
        return "its free entries move each token by a number of their own; use free_entries = False"
    if layer.config.entropy_gate:
        return "with the entropy gate its bias depends on the base distribution, which is not known before the head"
    if layer.support is not None:
        return f"it acts on {len(layer.support):,} tokens alone, a shift on all of them; use reach = 'vocabulary'"
    if transform.cap is not None:
        return f"the model soft-caps its logits at {transform.cap:g}, so no shift moves them by its bias"
    return None


@torch.no_grad()
def check_head_reads(model: nn.Module, backbone: nn.Module) -> None:
    """One forward on two tokens. Raises UserError where the head reads anything but the backbone's output."""
    written: list[Tensor] = []
    read: list[Tensor] = []
    head = output_embedding(model)
    hooks = [
        backbone.register_forward_hook(lambda module, inputs, output: written.append(_last_of(output))),
        head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0])),
    ]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=_input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not (len(written) == len(read) == 1 and _equal(written[0], read[0])):
        raise UserError(
            f"{type(model).__name__} does something between its backbone and its output embedding, so a shift of the "
            "backbone's hidden states would not be that of the adapter"
        )


def _equal(written: Tensor, read: Tensor) -> bool:
    size = written.shape[-1]
    return read.shape[-1] == size and torch.equal(written.reshape(-1, size), read.reshape(-1, size).to(written.device))


def _input_device(model: nn.Module) -> torch.device:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # Module types all as Tensor
    device: torch.device = embedding.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _vectors(layer: MoEBiasLayer) -> Tensor:
    """The directions and after them the writes, (C, D): what one unit of each coefficient adds to a hidden state."""
    assert layer.directions is not None
    return layer.directions if layer.writes is None else torch.cat([layer.directions, layer.writes.flatten(0, 1)])


def _last_of(output: Any) -> Tensor:
    """The last hidden states of what a backbone returned, with or without names."""
    last: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return last


def _with_last(output: Any, shifted: Tensor) -> Any:
    """The backbone's output with other last hidden states, in the list of all of them too."""
    if isinstance(output, tuple):
        return (shifted, *output[1:])
    all_of_them = getattr(output, "hidden_states", None)
    if all_of_them and all_of_them[-1] is output.last_hidden_state:
        output.hidden_states = (*all_of_them[:-1], shifted)
    output.last_hidden_state = shifted
    return output
