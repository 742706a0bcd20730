"""MoE-Bias in four lines, without PEFT around the model.

    from moe_bias import apply_moe_bias, get_moe_bias_layer

    layer = get_moe_bias_layer(model)                       # once; its parameters go to an optimiser
    output = model(**batch, output_hidden_states=True)
    logits = apply_moe_bias(output, model)                  # the final logits, moved by s b

The layer is the one of the PEFT form and so are its files: either loads what the other saved. Its
settings come from `MOE_BIAS_*` variables; with MOE_BIAS_ENABLED=0 the logits come
back as they are.

A layer that is a shift of the hidden states (see `moe_bias.adapter.shift`) can also act there, so that code which
multiplies with the output embedding itself, a fused loss among others, gets the adapted logits:

    with shift_hidden_states(model):
        loss = fused_loss(model.model(**batch).last_hidden_state, model.lm_head.weight, labels)

Shapes: B batch, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn

from moe_bias.adapter import (
    LastRouting,
    MoEBiasHead,
    base_entropy,
    save_layer,
)
from moe_bias.adapter.saved import load_layer
from moe_bias.adapter.shift import InsertedShift
from moe_bias.backbone import Head, HeadTransform, find_head, with_bias
from moe_bias.layer import MoEBiasLayer, at_least_float32, in_type, load_balance_loss
from moe_bias.mistakes import UserError
from moe_bias.variables import LayerVariables, from_variables


@dataclass
class _Attached:
    """A model's layer, its head, and what the last call left behind."""

    layer: MoEBiasLayer
    head: Head
    last: LastRouting = field(default_factory=LastRouting)
    checked: bool = False
    shift: InsertedShift | None = None

    @property
    def transform(self) -> HeadTransform:
        """What the model does to logits after its head."""
        return self.head.transform

    def shifting(self) -> MoEBiasLayer | None:
        """The layer that the hidden states are shifted by; None where the settings say that none is enabled."""
        return self.layer if _settings().enabled else None


_ATTACHED: WeakKeyDictionary[nn.Module, _Attached] = WeakKeyDictionary()


def get_moe_bias_layer(model: nn.Module, support: Sequence[int] | None = None) -> MoEBiasLayer:
    """The model's layer, made on the first call on the model's device and in its type.

    On a model that carries a PEFT adapter it is the active adapter's. `support` lists the token ids
    that have a bias (None: all) and counts on the first call. Raises ValueError where a later call
    names another support, where the model's head is not one that the layer can adjust, and on bad
    `MOE_BIAS_*` values.
    """
    adapter = _adapter_head(model)
    if adapter is not None:
        if adapter.active_layer is None:
            raise UserError("the model's MoE-Bias adapter is disabled or merged, so it has no active layer")
        return adapter.active_layer
    layer = _attached(model, support).layer
    if support is not None and tuple(support) != layer.config.support:
        raise UserError("the model already has a layer with another support; its support cannot be changed")
    return layer


def apply_moe_bias(model_output: Any, model: nn.Module) -> Any:
    """The final logits of `model_output`, moved by the model's layer, in their own shape and type.

    `model_output` is what `model(..., output_hidden_states=True)` returns (logits (B, L, V)), or
    `generate(..., return_dict_in_generate=True, output_hidden_states=True, output_logits=True)`
    (a tuple over steps of (B, V)). No gradient enters the model. Raises ValueError, saying which flag
    to pass, where logits or hidden states are missing; where the hidden states are not what the
    model's head reads; and where a PEFT adapter has moved the logits already.
    """
    logits = getattr(model_output, "logits", None)
    if logits is None:
        raise UserError(
            "the output has no logits; from generate, pass return_dict_in_generate=True and output_logits=True"
        )
    if not _settings().enabled:
        return logits
    if _adapter_head(model) is not None:
        raise UserError("the model carries a MoE-Bias adapter, so its logits are adapted already")
    if _attached(model).shift is not None:
        raise UserError("the model's hidden states are shifted, so its logits are adapted already")
    attached, hidden = _attached(model), _hidden_states(model_output)
    if isinstance(logits, tuple):
        stacked = torch.stack([step[-1][:, -1] for step in hidden])
        return _moved(attached, stacked, torch.stack(logits)).unbind()
    return _moved(attached, hidden[-1][:, -logits.shape[1] :], logits)


def shift_hidden_states(model: nn.Module) -> InsertedShift:
    """Lets the model's layer act at the backbone's output, until `remove()` or the end of a `with` block.

    Whatever multiplies the backbone's last hidden states with the head's own weight then gives the adapted logits:
    the model's own forward, TRL's and Liger's fused losses, a loss written by hand. Gradients reach the layer's
    parameters through it. On a PEFT model it is the active adapter that acts, at each forward. Features cannot be
    extracted from the model meanwhile: its hidden states are the shifted ones.

    It needs experts = 'directions' or 'linear' without free entries or entropy gate, on the whole vocabulary or with
    reach = 'vocabulary', and a model without soft-cap; what it costs and rounds is told at `HiddenShift`. Raises
    UserError, with the reason, where it would not be exact, which one forward on two tokens finds out.
    """
    adapter = _adapter_head(model)
    owner = _attached(model) if adapter is None else adapter
    return InsertedShift(owner, get_moe_bias_layer(model), _without_peft(model))


def get_load_balance_loss(model: nn.Module, counted: Tensor | None = None) -> Tensor:
    """The load-balance loss of the model's last call, times its weight: add it to the training loss.

    `counted` (the shape of that call's tokens) bool names the tokens that count in the loss (default
    all). For a PEFT adapter the last call is its last forward in training mode. Raises ValueError
    where there was none.
    """
    adapter = _adapter_head(model)
    last = adapter.last if adapter is not None else _attached(model).last
    if last.routing is None:
        raise UserError("no call yet whose load could be balanced: run the model in training mode with gradients")
    weight = get_moe_bias_layer(model).config.load_balance_weight
    return weight * load_balance_loss(last.routing, counted)


def save_moe_bias_layer(model: nn.Module, folder: str | Path) -> None:
    """Saves the model's layer as an adapter that `PeftModel.from_pretrained` loads too."""
    save_layer(get_moe_bias_layer(model), folder, model)


def load_moe_bias_layer(model: nn.Module, source: str | Path) -> MoEBiasLayer:
    """Gives the model the layer of an adapter folder or Hub id, saved here or by PEFT.

    Raises ValueError where the adapter was made for other sizes or its file is damaged, or where the
    model carries a PEFT adapter.
    """
    if _adapter_head(model) is not None:
        raise UserError("the model carries a PEFT adapter; load another with its load_adapter")
    if model in _ATTACHED and _ATTACHED[model].shift is not None:
        raise UserError("the model's hidden states are shifted by its layer; remove() the shift before loading another")
    _, head = find_head(model)
    layer = _like_model(load_layer(source, head), head)
    _ATTACHED[model] = _Attached(layer, head)
    return layer


def _attached(model: nn.Module, support: Sequence[int] | None = None) -> _Attached:
    if model not in _ATTACHED:
        _, head = find_head(model)
        _ATTACHED[model] = _Attached(_like_model(head.layer(_settings().layer_config(support)), head), head)
    return _ATTACHED[model]


def _like_model(layer: MoEBiasLayer, head: Head) -> MoEBiasLayer:
    """The layer on the head's device; parameters in its type, where its weight is not packed."""
    layer.to(head.device)
    if not head.rows.are_packed:
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(head.dtype)
    return layer


def _settings() -> LayerVariables:
    return from_variables(LayerVariables)


def _adapter_head(model: nn.Module) -> MoEBiasHead | None:
    return next((module for module in model.modules() if isinstance(module, MoEBiasHead)), None)


def _without_peft(model: nn.Module) -> nn.Module:
    """The model whose forward PEFT's wrapper calls."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _hidden_states(model_output: Any) -> Any:
    for name in ("hidden_states", "decoder_hidden_states"):
        hidden = getattr(model_output, name, None)
        if hidden is not None:
            return hidden
    raise UserError("the output has no hidden states: pass output_hidden_states=True to the model or to generate")


def _moved(attached: _Attached, hidden: Tensor, logits: Tensor) -> Tensor:
    hidden, logits = hidden.detach(), logits.detach()
    if hidden.shape[:-1] != logits.shape[:-1]:
        raise UserError(f"hidden states of shape {tuple(hidden.shape)} do not belong to {tuple(logits.shape)} logits")
    if not attached.checked:
        _check_last_hidden_state(attached.head, hidden.flatten(0, -2)[-1:], logits.flatten(0, -2)[-1:])
        attached.checked = True
    layer = attached.layer.to(hidden.device)
    output = layer(hidden, base_entropy(logits, HeadTransform()))
    attached.last.routing = output.routing
    final = with_bias(layer, attached.head.transform, at_least_float32(logits), output.bias)
    return in_type(final, logits.dtype)


def _check_last_hidden_state(head: Head, hidden: Tensor, logits: Tensor) -> None:
    """On some architectures the last hidden state that is returned is not the one that the head reads."""
    expected = head.logits(hidden.to(head.device)).to(logits.device)
    tolerance = max(16 * torch.finfo(hidden.dtype).eps, 1e-4) * (1 + float(logits.abs().max()))
    error = float((expected - logits).abs().max())
    if not error <= tolerance:
        raise UserError(
            f"the head's logits for the last hidden state are {error:.3g} away from the output's logits: this "
            "architecture returns other hidden states than its head reads; use the PEFT form, MoEBiasConfig"
        )
