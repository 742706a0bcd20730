"""MoE-Bias as a PEFT method: the layer of `moe_bias.layer` at a model's output embedding.

`MoEBiasHead` takes the place of the output embedding. With h its input and z = base_layer(h), it
returns z moved so that the *final* logits, after whatever the model does to z (a soft-cap, a scale),
differ from the base model's by exactly s b. Importing this module registers the method with PEFT.

What PEFT does not know about us, and how it is told:
- `PeftType` is a closed enum; a string that behaves like a member stands in for ours.
- The module to adapt is the model's output embedding. A `target_modules` field naming it would make
  PEFT save the whole embedding, so the config has no such field.
- A fused kernel that multiplies with the head's weight itself would lose the bias without a word, so
  a forward of the model in which the head did not run is refused, whoever caused it.

Shapes: T tokens (any leading shape), D hidden size, V vocabulary, M support.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_bias.backbone import HeadTransform, measure_head_transform, output_embedding
from moe_bias.card import write_card
from moe_bias.config import LayerConfig
from moe_bias.layer import (
    LayerOutput,
    MoEBiasLayer,
    Routing,
    at_least_float32,
    check_layer_tensors,
    entropy_from_logits,
)

PREFIX = "moe_bias_"
LAYERS = "moe_bias_layers"
"""The head's container of layers. Its name is part of every key in an adapter file."""
_ENTROPY_CHUNK = 2**24
"""Logits whose entropy is taken at once: 64 MiB of float32, so that long sequences need no more."""
_ENTROPY_CHUNK_CPU = 2**18
"""On a CPU temporaries of 1 MiB stay in its cache and in the allocator; larger ones cost twice the time."""


class _MoEBiasType(str):
    """Stands where PEFT expects a member of its enum `PeftType`; hashes and compares as its text."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return "MOE_BIAS"

    @property
    def name(self) -> str:
        return "MOE_BIAS"

    def __str__(self) -> str:
        return "PeftType.MOE_BIAS"


PEFT_TYPE = _MoEBiasType("MOE_BIAS")


@dataclass
class MoEBiasConfig(PeftConfig):
    """Settings of one adapter, and what was measured when it was made.

    `support` lists the token ids that have a bias (None: all). `fork_coverage` is the share of the
    base's probability mass at forks that the support holds on held-out text. `hidden_size` and
    `vocab_size` are those of the model it was made for; they are filled in when it is attached.
    Raises ValueError, in one sentence, on anything that cannot be built.
    """

    task_type: str | None = "CAUSAL_LM"
    num_experts: int = 16
    top_k: int = 2
    support: list[int] | None = None
    entropy_gate: bool = True
    load_balance_weight: float = 0.01
    strength: float = 1.0
    fork_coverage: float | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None

    target_modules = None  # not a field: see the module docstring

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        layer = self.layer_config()
        self.support = None if layer.support is None else list(layer.support)

    def layer_config(self) -> LayerConfig:
        """The choices that define the layer. Raises ValueError naming the offending value."""
        try:
            return LayerConfig(
                num_experts=self.num_experts,
                top_k=self.top_k,
                support=None if self.support is None else tuple(self.support),
                entropy_gate=self.entropy_gate,
                load_balance_weight=self.load_balance_weight,
                strength=self.strength,
            )
        except ValidationError as error:
            raise ValueError(_one_sentence(error)) from error

    def for_model(self, hidden_size: int, vocab_size: int) -> MoEBiasConfig:
        """A copy that knows its model's sizes. Raises ValueError where it was made for others."""
        ours, theirs = (self.hidden_size, self.vocab_size), (hidden_size, vocab_size)
        for name, made_for, has in zip(("hidden_size", "vocab_size"), ours, theirs, strict=True):
            if made_for is not None and made_for != has:
                raise ValueError(f"this adapter was made for {name} {made_for}, the model has {has}")
        self.layer_config().check_vocabulary(vocab_size)
        config = copy.copy(self)
        config.hidden_size, config.vocab_size = theirs
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the config, and a model card beside it that says what the adapter is."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), self.to_dict())


class LastRouting:
    """The routing of the last training forward; a copy of the model leaves the graph it holds behind."""

    def __init__(self) -> None:
        self.routing: Routing | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LastRouting:
        return LastRouting()


class MoEBiasHead(nn.Module, BaseTunerLayer):
    """The output embedding with MoE-Bias layers around it, one per adapter name, one active at a time.

    `last` holds the routing of the last forward with gradients, for the load-balance loss.
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
        self._ran = False
        self._hooks: list[RemovableHandle] = []
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = [adapter_name]
        self._bias_before_merge: list[nn.Parameter | None] = []  # a list, or it would be a parameter of this module
        self._unchecked: set[str] = set()

    @property
    def active_layer(self) -> MoEBiasLayer | None:
        """The layer that the next forward applies: None when disabled, merged or without adapters."""
        if self.disable_adapters or self.merged or not self.active_adapters:
            return None
        layer = self.moe_bias_layers[self.active_adapters[0]]
        assert isinstance(layer, MoEBiasLayer)
        return layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raw logits (..., V) in the base layer's type, for hidden states (..., D).

        No gradient enters `hidden`. The base layer's output is overwritten, which spares long
        sequences a second tensor of T x V.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        layer = self.active_layer
        if layer is None:
            unchanged: Tensor = self.base_layer(hidden, *args, **kwargs)
            return unchanged
        self._check_once()
        hidden = hidden.detach()
        raw = self.base_layer(hidden, *args, **kwargs)
        output = layer(hidden.to(raw.device), base_entropy(raw, self.transform))
        self.last.routing = output.routing if torch.is_grad_enabled() and self.training else None
        return move_logits(raw, layer, output, self.transform)

    def update_layer(self, adapter_name: str, config: MoEBiasConfig) -> None:
        """Adds a fresh layer for an adapter, in float32 on the output embedding's device."""
        layer = MoEBiasLayer(config.layer_config(), self.in_features, self.out_features)
        self.moe_bias_layers[adapter_name] = layer
        self._unchecked.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active. Raises ValueError on several, or on one of another method."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"MoE-Bias applies one adapter at a time, got {names}")
        for name in names:
            if name not in self.moe_bias_layers:
                raise ValueError(
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
                raise ValueError(f"the merged bias of adapter {name!r} holds NaN or infinite values")
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
        """Takes the hooks of `watch` away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _on_model_begun(self, *_: Any) -> None:
        self._ran = False

    def _on_head_ran(self, *_: Any) -> None:
        self._ran = True

    def _on_model_done(self, model: nn.Module, *_: Any) -> None:
        if not self._ran and self.active_layer is not None:
            raise ValueError(
                f"this forward of {type(model).__name__} went past its output embedding, so the MoE-Bias adapter was "
                "not applied: it cannot be used with a fused loss or head (TRL's trainers, Liger kernels)"
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


class MoEBiasModel(BaseTuner):
    """PEFT's handle on a model with MoE-Bias adapters at its output embedding."""

    prefix = PREFIX
    tuner_layer_cls = MoEBiasHead
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts a fresh layer at the output embedding; the adapter's config learns the model's sizes.

        Raises ValueError, leaving the model as it was, where the adapter does not fit it or cannot
        work on it.
        """
        refuse_foreign_layers(model)
        refuse_disk_offload(model)
        head: Any = output_embedding(model)
        self._target = next(name for name, module in model.named_modules() if module is head)
        self._transform = head.transform if isinstance(head, MoEBiasHead) else measure_head_transform(model)
        config = self.peft_config[adapter_name]
        self.peft_config[adapter_name] = config.for_model(int(head.in_features), int(head.out_features))
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: MoEBiasConfig, model_config: Any) -> MoEBiasConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: MoEBiasConfig, key: str) -> bool:
        return bool(key == self._target)

    def _create_and_replace(
        self,
        peft_config: MoEBiasConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoEBiasHead):
            target.update_layer(adapter_name, peft_config)
            return
        head = MoEBiasHead(target, self._transform, adapter_name)
        head.update_layer(adapter_name, peft_config)
        setattr(parent, target_name, head)  # PEFT's own replacement would move layers of an offloaded head to meta
        head.watch(self.model)
        self.model.resize_token_embeddings = refuse_resize

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("MoE-Bias applies one adapter to a whole batch; adapter_names per row is not supported")
        yield

    def _check_merge_allowed(self) -> None:
        """Nothing to check here: `MoEBiasHead.merge` does, and tied weights are not touched by a bias."""

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        head = find_adapter_head(self.model)
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        head.unwatch()
        self.model.__dict__.pop("resize_token_embeddings", None)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{LAYERS}.{adapter_name}.", f".{LAYERS}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoEBiasConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        check_adapter_file(state_dict, config)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def base_entropy(raw: Tensor, transform: HeadTransform) -> Tensor:
    """Entropy (...,) in nats of the base distribution, from raw logits (..., V), without gradient."""
    chunk = _ENTROPY_CHUNK_CPU if raw.device.type == "cpu" else _ENTROPY_CHUNK
    rows = max(chunk // raw.shape[-1], 1)
    with torch.no_grad():
        if raw.numel() <= rows * raw.shape[-1]:
            return entropy_from_logits(transform.apply(raw))
        chunks = raw.flatten(0, -2).split(rows)
        return torch.cat([entropy_from_logits(transform.apply(chunk)) for chunk in chunks]).view(raw.shape[:-1])


def move_logits(raw: Tensor, layer: MoEBiasLayer, output: LayerOutput, transform: HeadTransform) -> Tensor:
    """Raw logits (..., V), overwritten so that the final ones move by `strength * bias` on the support.

    The sum is taken in float32 and rounded once to the type of `raw`; other entries keep their bits.
    """
    move = output.bias if layer.strength == 1.0 else layer.strength * output.bias
    if layer.support is None:
        return raw.add_(_raw_move(raw, move, transform))
    columns = raw.index_select(-1, layer.support)
    return raw.index_copy_(-1, layer.support, columns.add_(_raw_move(columns, move, transform)))


def _raw_move(raw: Tensor, move: Tensor, transform: HeadTransform) -> Tensor:
    return transform.raw_move(raw, move)


def merged_bias(head: MoEBiasHead, adapter_name: str) -> Tensor:
    """The bias (V,) that the base layer would have with a static adapter merged into it.

    Raises ValueError, with the reason, where the result would not be exact.
    """
    layer, base = head.moe_bias_layers[adapter_name], head.base_layer
    assert isinstance(layer, MoEBiasLayer)
    reason = _why_not_static(layer, head.transform)
    if reason is None and not isinstance(base, nn.Linear):
        reason = f"its output embedding is a {type(base).__name__}, which holds no plain bias"
    if reason is not None:
        raise ValueError(f"adapter {adapter_name!r} cannot be merged: {reason}")
    with torch.no_grad():
        move = layer.on_vocabulary(layer.strength * layer.experts.float()).squeeze(0) / head.transform.scale
        exact = move if base.bias is None else base.bias.float() + move
        rounded = exact.to(base.weight.dtype)
    if not torch.equal(rounded.float(), exact):
        raise ValueError(
            f"adapter {adapter_name!r} cannot be merged: {rounded.dtype} cannot hold its bias exactly; "
            "load the model in float32 to merge"
        )
    return rounded


def _why_not_static(layer: MoEBiasLayer, transform: HeadTransform) -> str | None:
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
    raise ValueError(f"{type(model).__name__} has no MoE-Bias adapter; attach one with get_peft_model")


def layer_shapes(config: LayerConfig, hidden_size: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter file holds."""
    with torch.device("meta"):
        layer = MoEBiasLayer(config, hidden_size, vocab_size)
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def layer_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter file by their name in the layer; other tensors are left out."""
    mark = f"{LAYERS}."
    return {key.rpartition(mark)[2]: value for key, value in state_dict.items() if mark in key}


def check_adapter_file(state_dict: Mapping[str, Tensor], config: MoEBiasConfig) -> None:
    """Raises ValueError, in one sentence, on an adapter file with a missing, misshapen or non-finite tensor."""
    assert config.hidden_size is not None
    assert config.vocab_size is not None
    shapes = layer_shapes(config.layer_config(), config.hidden_size, config.vocab_size)
    tensors = layer_tensors(state_dict)
    for what, names in (("lacks", set(shapes) - set(tensors)), ("has an unknown", set(tensors) - set(shapes))):
        if names:
            raise ValueError(f"the adapter file {what} tensor {min(names)!r}")
    check_layer_tensors(tensors, shapes)


def save_layer(
    layer: MoEBiasLayer, folder: str | Path, model: nn.Module, fork_coverage: float | None = None
) -> MoEBiasConfig:
    """Writes a layer that stands alone as an adapter folder that PEFT loads; returns its config."""
    head = output_embedding(model)
    name = next(name for name, module in model.named_modules() if module is head)
    config = MoEBiasConfig(
        **layer.config.model_dump(), fork_coverage=fork_coverage, base_model_name_or_path=_name_of(model)
    ).for_model(layer.hidden_size, layer.vocab_size)
    config.inference_mode = True
    config.strength = layer.strength
    tensors = layer.state_dict()
    config.save_pretrained(str(folder))
    save_file(
        {
            f"base_model.model.{name}.{LAYERS}.{key}": at_least_float32(value).contiguous()
            for key, value in tensors.items()
        },
        Path(folder) / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    return config


def read_adapter(source: str | Path) -> tuple[MoEBiasConfig, dict[str, Tensor]]:
    """Config and tensors of an adapter folder or Hub id, the tensors named as in its file.

    Raises ValueError where there is no MoE-Bias adapter.
    """
    config = PeftConfig.from_pretrained(str(source))
    if not isinstance(config, MoEBiasConfig):
        raise ValueError(f"{str(source)!r} holds an adapter of {type(config).__name__}, not a MoE-Bias one")
    path = Path(source) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if Path(source).is_dir():
            raise ValueError(f"{str(source)!r} holds no {SAFETENSORS_WEIGHTS_NAME}")
        path = Path(hf_hub_download(str(source), SAFETENSORS_WEIGHTS_NAME))
    return config, load_file(path)


def _name_of(model: nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None


def refuse_resize(*args: Any, **kwargs: Any) -> None:
    """Stands for `resize_token_embeddings`, which would put a new head in the adapter's place."""
    raise ValueError("resize_token_embeddings would drop the MoE-Bias adapter: resize the model before attaching it")


def refuse_foreign_layers(model: nn.Module) -> None:
    """Raises ValueError where the model has adapters of another PEFT method."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MoEBiasHead):
            raise ValueError(
                f"the model has a {type(module).__name__} adapter at {name!r}; one model cannot mix it with MoE-Bias: "
                "merge_and_unload() it first"
            )


def refuse_disk_offload(model: nn.Module) -> None:
    """Raises ValueError on a model with parts on disk: PEFT would rewrite its files when it loads an adapter."""
    device_map = getattr(model, "hf_device_map", None) or {}
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    if on_disk:
        raise ValueError(
            f"part {on_disk[0]!r} of the model is offloaded to disk, where loading an adapter would rewrite the "
            "model's own files; load it with a device_map without 'disk'"
        )


def _device_of(base_layer: nn.Module) -> torch.device:
    """Where the output embedding computes; a head that accelerate offloads has its weights on 'meta'."""
    hook = getattr(base_layer, "_hf_hook", None)
    if getattr(hook, "offload", False):
        return torch.device(hook.execution_device)  # type: ignore[union-attr]
    tensors = [*base_layer.parameters(), *base_layer.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _one_sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return reason
    return f"{first['loc'][0]} = {first['input']!r}: {reason[0].lower()}{reason[1:]}"


def _register() -> None:
    """What PEFT's `register_peft_method` does, less its check that the name is in the enum `PeftType`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MoEBiasConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MoEBiasModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX


_register()
