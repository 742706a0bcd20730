"""MoE-Bias as a PEFT method. Importing it registers the method."""

from moe_bias.adapter.config import PEFT_TYPE, MoEBiasConfig
from moe_bias.adapter.files import check_adapter_file, layer_tensors, read_adapter, save_layer
from moe_bias.adapter.head import LastRouting, MoEBiasHead, base_entropy, find_adapter_head
from moe_bias.adapter.tuner import MoEBiasModel

__all__ = [
    "PEFT_TYPE",
    "LastRouting",
    "MoEBiasConfig",
    "MoEBiasHead",
    "MoEBiasModel",
    "base_entropy",
    "check_adapter_file",
    "find_adapter_head",
    "layer_tensors",
    "read_adapter",
    "save_layer",
]
