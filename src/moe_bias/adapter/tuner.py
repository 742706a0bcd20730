"""MoE-Bias as a PEFT method: PEFT's handle on a model with adapters at its output embedding.

Importing this module registers the method with PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from moe_bias.adapter.card import tag_model, untag_model
from moe_bias.adapter.config import PEFT_TYPE, MoEBiasConfig
from moe_bias.adapter.files import LAYERS, check_adapter_file
from moe_bias.adapter.head import BASE, MoEBiasHead, find_adapter_head
from moe_bias.backbone import OutputRows, measure_head_transform, output_embedding, unwrapped
from moe_bias.mistakes import UserError, shown

PREFIX = "moe_bias_"


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
        rows = OutputRows(unwrapped(head))
        self.peft_config[adapter_name] = config.attached(int(head.in_features), int(head.out_features), rows)
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
        tag_model(self.model)
        self.model.resize_token_embeddings = refuse_resize

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While a forward or `generate` with `adapter_names` runs, each row has its own adapter."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        head = find_adapter_head(self.model)
        self._check_rows(head, names)
        beams = kwargs.get("num_beams") or 1
        head.rows = [name for name in names for _ in range(beams)]  # beams of a row stand together
        try:
            yield
        finally:
            head.rows = None

    def _check_rows(self, head: MoEBiasHead, names: Any) -> None:
        """Raises UserError on what `adapter_names` cannot be."""
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise UserError(f"`adapter_names` is {shown(names)}; give a list of names, one for each row of the batch")
        unknown = [name for name in names if name != BASE and name not in head.moe_bias_layers]
        if unknown:
            known = ", ".join([*map(repr, head.moe_bias_layers), repr(BASE)])
            raise UserError(f"`adapter_names` has {shown(unknown[0])}, and the model has {known}")
        if self.training:
            raise UserError("`adapter_names` is for inference; call model.eval() first, or make one adapter active")
        if head.merged or head.shift is not None:
            raise UserError(
                "`adapter_names` needs adapters at the head, and one is merged or a shift of the hidden states now; "
                "take that back first"
            )

    def _check_merge_allowed(self) -> None:
        """Nothing to check here: `MoEBiasHead.merge` does, and tied weights are not touched by a bias."""

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        head = find_adapter_head(self.model)
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        head.unwatch()
        untag_model(self.model)
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


def refuse_resize(*args: Any, **kwargs: Any) -> None:
    """Stands for `resize_token_embeddings`, which would put a new head in the adapter's place."""
    raise UserError("resize_token_embeddings would drop the MoE-Bias adapter: resize the model before attaching it")


def refuse_foreign_layers(model: nn.Module) -> None:
    """Raises ValueError where the model has adapters of another PEFT method."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MoEBiasHead):
            raise UserError(
                f"the model has a {type(module).__name__} adapter at {name!r}; one model cannot mix it with MoE-Bias: "
                "merge_and_unload() it first"
            )


def refuse_disk_offload(model: nn.Module) -> None:
    """Raises ValueError on a model with parts on disk: PEFT would rewrite its files when it loads an adapter."""
    device_map = getattr(model, "hf_device_map", None) or {}
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    if on_disk:
        raise UserError(
            f"part {on_disk[0]!r} of the model is offloaded to disk, where loading an adapter would rewrite the "
            "model's own files; load it with a device_map without 'disk'"
        )


def _register() -> None:
    """What PEFT's `register_peft_method` does, less its check that the name is in the enum `PeftType`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MoEBiasConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MoEBiasModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX


_register()
