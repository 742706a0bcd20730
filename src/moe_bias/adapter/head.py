"""The output embedding with MoE-Bias layers around it.

With h its input and z = base_layer(h), `MoEBiasHead` returns z moved so that the *final* logits, after
whatever the model does to z (a soft-cap, a scale), differ from the base model's by exactly s b. A fused
kernel that multiplies with the head's weight itself would lose the bias without a word, so a forward
of the model in which the head did not run is refused, whoever caused it. Where the adapter is inserted as
a shift of the backbone's hidden states (see `shift`), it is applied there, and the head adds nothing.

Shapes: T tokens (any leading shape), D hidden size, V vocabulary, M support.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_bias.adapter.config import MoEBiasConfig
from moe_bias.adapter.files import LAYERS, layer_shapes
from moe_bias.backbone import HeadTransform, OutputRows, offload_hook
from moe_bias.combined import summed_move
from moe_bias.layer import (
    LayerOutput,
    MoEBiasLayer,
    Routing,
    check_layer_tensors,
    entropy_in_pieces,
    in_type,
)
from moe_bias.mistakes import UserError

if TYPE_CHECKING:
    from moe_bias.adapter.shift import InsertedShift


BASE = "__base__"
"""PEFT's name of no adapter, for a row of a batch."""


class LastRouting:
    """The routing of the last training forward; a copy of the model leaves the graph it holds behind."""

    def __init__(self) -> None:
        self.routing: Routing | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LastRouting:
        return LastRouting()


class MoEBiasHead(nn.Module, BaseTunerLayer):
    """The output embedding with MoE-Bias layers around it, one per adapter name; the biases of active ones add.

    `rows` names the adapter of each row of the batch in place of the active ones, `BASE` for none. `last` holds the
    routing of the last forward with gradients, for the load-balance loss; `shift` what applies the active adapter in
    the head's place.
    """

    adapter_layer_names = (LAYERS,)
    moe_bias_layers: nn.ModuleDict
    base_layer: Any
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def __init__(self, base_layer: nn.Module, transform: HeadTransform, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moe_bias_layers = nn.ModuleDict()
        self.transform = transform
        self.in_features = int(self.base_layer.in_features)
        self.out_features = int(self.base_layer.out_features)
        self.last = LastRouting()
        self.shift: InsertedShift | None = None
        self.rows: Sequence[str] | None = None
        self._ran = False
        self._hooks: list[RemovableHandle] = []
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = [adapter_name]
        self._bias_before_merge: list[nn.Parameter | None] = []  # a list, or it would be a parameter of this module
        self._unchecked: set[str] = set()

    @property
    def active_layers(self) -> list[MoEBiasLayer]:
        """The layers that the next forward applies to every row: none when disabled, merged or without adapters."""
        if self.disable_adapters or self.merged:
            return []
        return [self._layer(name) for name in self.active_adapters]

    @property
    def active_layer(self) -> MoEBiasLayer | None:
        """The only one of them, or None. Raises UserError where there are several."""
        layers = self.active_layers
        if len(layers) > 1:
            raise UserError(f"the adapters {self.active_adapters} are active together; this is for one active adapter")
        return layers[0] if layers else None

    def _layer(self, name: str) -> MoEBiasLayer:
        layer = self.moe_bias_layers[name]
        assert isinstance(layer, MoEBiasLayer)
        return layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raw logits (..., V) in the base layer's type, for hidden states (..., D).

        No gradient enters `hidden`. The base layer's output is overwritten, which spares long
        sequences a second tensor of T x V.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        layers = self.active_layers
        if self.shift is not None or self.disable_adapters or not (layers or self.rows):
            unchanged: Tensor = self.base_layer(hidden, *args, **kwargs)
            return unchanged
        self._check_once()
        hidden = hidden.detach()
        raw = self.base_layer(hidden, *args, **kwargs)
        hidden = hidden.to(raw.device)
        if self.rows is not None:
            return self._moved_by_row(raw, hidden, self.rows)
        output, moved = self._moved(raw, hidden, layers)
        self.last.routing = output.routing if output and torch.is_grad_enabled() and self.training else None
        return moved

    def _moved_by_row(self, raw: Tensor, hidden: Tensor, names: Sequence[str]) -> Tensor:
        """Raw logits (B, ..., V), each row moved by the adapter of its name."""
        if len(names) != len(raw):
            raise UserError(f"`adapter_names` has {len(names)} names, and the batch {len(raw)} rows; give one a row")
        moved = raw.clone()
        for name in dict.fromkeys(names):
            if name != BASE:
                rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=raw.device)
                moved[rows] = self._moved(raw[rows], hidden[rows], [self._layer(name)])[1]
        return moved

    def _moved(self, raw: Tensor, hidden: Tensor, layers: Sequence[MoEBiasLayer]) -> tuple[LayerOutput | None, Tensor]:
        """Raw logits (..., V), perhaps overwritten, and what a single layer gave."""
        entropy = base_entropy(raw, self.transform)
        if len(layers) > 1:
            move = summed_move([(layer, layer.strength) for layer in layers], hidden, entropy)
            return None, _add(raw, self.transform.raw_move(raw, move.amount))
        (layer,) = layers
        output = layer(hidden, entropy)
        return output, move_logits(raw, layer, output, self.transform)

    def shifting(self) -> MoEBiasLayer | None:
        """The layer that a shift of the hidden states applies in this forward: it counts as applied."""
        self._ran = True
        self._check_once()
        return self.active_layer

    def update_layer(self, adapter_name: str, config: MoEBiasConfig) -> None:
        """Adds a fresh layer for an adapter, in float32 on the output embedding's device."""
        rows = OutputRows(self.base_layer)
        layer = MoEBiasLayer(config.layer_config(), self.in_features, self.out_features, rows)
        self.moe_bias_layers[adapter_name] = layer
        self._unchecked.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters active, whose biases add. Raises ValueError on one of another method."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self.moe_bias_layers:
                raise UserError(
                    f"{name!r} is not a MoE-Bias adapter of this model ({sorted(self.moe_bias_layers)} are); "
                    "one model cannot mix it with adapters of another method"
                )
        super().set_adapter(names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes one static bias part of the output embedding's own bias, where that is exact.

        Raises ValueError with the reason where it is not.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            bias = merged_bias(self, name)
            if safe_merge and not torch.isfinite(bias).all():
                raise UserError(f"the merged bias of adapter {name!r} holds NaN or infinite values")
            if self.base_layer.bias is None:
                warnings.warn(
                    "the output embedding had no bias and now has one, which from_pretrained of this "
                    "architecture drops: save the adapter, not the merged model",
                    stacklevel=2,
                )
            if not self.merged:
                self._bias_before_merge = [self.base_layer.bias]
            self.base_layer.bias = nn.Parameter(bias, requires_grad=False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Gives the output embedding the very bias back that it had, or none."""
        if self.merged:
            self.base_layer.bias = self._bias_before_merge.pop()
            self.merged_adapters.clear()

    def train(self, mode: bool = True) -> MoEBiasHead:
        """Sets the mode. PEFT and transformers call `eval()` when they have loaded an adapter: it is checked here."""
        if not mode:
            self._check_new_layers()
        return super().train(mode)

    def watch(self, model: nn.Module) -> None:
        """From here on a forward of `model` that goes past this head raises ValueError.

        Fused losses (TRL, Liger) and pruned heads multiply with the head's weight themselves; the
        bias would be missing from their output and get no gradient.
        """
        self._hooks = [
            model.register_forward_pre_hook(self._on_model_begun),
            self.register_forward_pre_hook(self._on_head_ran),
            model.register_forward_hook(self._on_model_done),
        ]

    def unwatch(self) -> None:
        """Takes the hooks of `watch` away, and a shift."""
        if self.shift is not None:
            self.shift.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _on_model_begun(self, *_: Any) -> None:
        self._ran = False

    def _on_head_ran(self, *_: Any) -> None:
        self._ran = True

    def _on_model_done(self, model: nn.Module, *_: Any) -> None:
        if not self._ran and not self.disable_adapters and (self.active_layers or self.rows):
            raise UserError(
                f"this forward of {type(model).__name__} went past its output embedding, so the MoE-Bias adapter was "
                "not applied: with a fused loss or head (TRL's trainers, Liger kernels) it can be used only as a shift "
                "of the hidden states, shift_hidden_states(model)"
            )

    def _check_once(self) -> None:
        """Transformers assigns loaded tensors without load_state_dict: a first forward checks them too."""
        if self._unchecked and not torch.compiler.is_compiling():
            self._check_new_layers()
            self._unchecked.clear()

    def _check_new_layers(self) -> None:
        for name in self._unchecked.intersection(self.moe_bias_layers):
            layer = self.moe_bias_layers[name]
            assert isinstance(layer, MoEBiasLayer)
            check_layer_tensors(layer.state_dict(), layer_shapes(layer.config, self.in_features, self.out_features))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Only the device: PEFT would also cast to the base's type, and half precision spoils the buffers."""
        layer = self.moe_bias_layers[adapter_name]
        target = device or _device_of(self.base_layer)
        if not any(tensor.is_meta for tensor in layer.parameters()):
            layer.to(target)

    def __setattr__(self, name: str, value: Any) -> None:
        """`weight` and `bias` belong to the base layer: tying weights and FSDP assign them here."""
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)


def base_entropy(raw: Tensor, transform: HeadTransform) -> Tensor:
    """Entropy (...,) in nats of the base distribution, from raw logits (..., V), without gradient."""
    with torch.no_grad():
        rows = raw.reshape(-1, raw.shape[-1])
        return entropy_in_pieces(rows, raw.shape[-1], transform.apply).view(raw.shape[:-1])


def move_logits(raw: Tensor, layer: MoEBiasLayer, output: LayerOutput, transform: HeadTransform) -> Tensor:
    """Raw logits (..., V), overwritten so that the final ones move by `strength * bias` on the support.

    The sum is taken in float32 and rounded once to the type of `raw`; other entries keep their bits.
    """
    move = output.bias if layer.strength == 1.0 else layer.strength * output.bias
    if layer.support is None:
        return _add(raw, transform.raw_move(raw, move))
    columns = raw.index_select(-1, layer.support)
    return raw.index_copy_(-1, layer.support, _add(columns, transform.raw_move(columns, move)))


def _add(raw: Tensor, move: Tensor) -> Tensor:
    """The sum, in place where its type has room for it."""
    return in_type(raw + move, raw.dtype) if raw.dtype == torch.float16 else raw.add_(move)


def merged_bias(head: MoEBiasHead, adapter_name: str) -> Tensor:
    """The bias (V,) that the base layer would have with a static adapter merged into it.

    Raises ValueError, with the reason, where the result would not be exact.
    """
    layer, base = head.moe_bias_layers[adapter_name], head.base_layer
    assert isinstance(layer, MoEBiasLayer)
    reason = _why_not_static(layer, head.transform)
    if reason is None and (not isinstance(base, nn.Linear) or OutputRows(base).are_packed):
        kind = f"{type(base).__name__} with a weight of type {type(base.weight).__name__}"
        reason = f"its output embedding is a {kind}, no plain linear layer"
    if reason is not None:
        raise UserError(f"adapter {adapter_name!r} cannot be merged: {reason}")
    with torch.no_grad():
        move = layer.on_vocabulary(layer.strength * layer.table().float()).squeeze(0) / head.transform.scale
        exact = move if base.bias is None else base.bias.float() + move
        rounded = exact.to(base.weight.dtype)
    if not torch.equal(rounded.float(), exact):
        raise UserError(
            f"adapter {adapter_name!r} cannot be merged: {rounded.dtype} cannot hold its bias exactly; "
            "load the model in float32 to merge"
        )
    return rounded


def _why_not_static(layer: MoEBiasLayer, transform: HeadTransform) -> str | None:
    if layer.config.rank:
        return "with linear experts its bias depends on the hidden state"
    if layer.config.num_experts > 1:
        return f"with {layer.config.num_experts} experts its bias depends on the hidden state"
    if layer.config.entropy_gate:
        return "with the entropy gate its bias depends on the base distribution"
    if transform.cap is not None:
        return f"the model soft-caps its logits at {transform.cap:g}, so no constant before the cap moves them equally"
    return None


def find_adapter_head(model: nn.Module) -> MoEBiasHead:
    """The output embedding with its adapters. Raises ValueError on a model without a MoE-Bias adapter."""
    for module in model.modules():
        if isinstance(module, MoEBiasHead):
            return module
    raise UserError(f"{type(model).__name__} has no MoE-Bias adapter; attach one with get_peft_model")


def _device_of(base_layer: nn.Module) -> torch.device:
    """Where the output embedding computes; a head that accelerate offloads has its weights on 'meta'."""
    hook = offload_hook(base_layer)
    if hook is not None:
        return torch.device(hook.execution_device)
    tensors = [*base_layer.parameters(), *base_layer.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
