"""Finding and reading a saved adapter, without its model or as a layer at its model's head."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from moe_bias.adapter.config import PEFT_TYPE, MoEBiasConfig
from moe_bias.adapter.files import check_adapter_file, layer_tensors, read_adapter
from moe_bias.backbone import Head
from moe_bias.layer import MoEBiasLayer
from moe_bias.mistakes import UserError, damaged, read_json
from moe_bias.records import remove_left_overs

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MOE_BIAS = str(PEFT_TYPE.value)


def load_layer(source: str | Path, head: Head) -> MoEBiasLayer:
    """The layer of an adapter folder or Hub id, saved here or by PEFT, on the head's device.

    Raises UserError where there is no adapter of the method, or it is damaged or of another model.
    """
    return load_adapter(source, head)[0]


def load_adapter(source: str | Path, head: Head) -> tuple[MoEBiasLayer, MoEBiasConfig]:
    """`load_layer` with the adapter's config, which knows the model."""
    config, tensors = read_saved(source)
    found = (config.hidden_size, config.vocab_size)
    if found != (head.hidden_size, head.vocab_size):
        raise UserError(
            f"the adapter in {str(source)!r} is of another model: its hidden states and vocabulary are {found[0]} and "
            f"{found[1]} wide, here they are {head.hidden_size} and {head.vocab_size}"
        )
    config = config.for_model(head.hidden_size, head.vocab_size, head.rows)
    layer = head.layer(config.layer_config())
    layer.load_state_dict(tensors)
    return layer.to(head.device), config


def read_saved(name: str | Path) -> tuple[MoEBiasConfig, dict[str, Tensor]]:
    """Config of an adapter folder or Hub id, and its tensors by their name in the layer.

    Raises UserError where the adapter is missing, of another method, or damaged.
    """
    folder = adapter_folder(name)
    try:
        config, tensors = read_adapter(folder)
        if config.hidden_size is None or config.vocab_size is None:
            raise UserError(f"{CONFIG_FILE} lacks hidden_size or vocab_size")
        check_adapter_file(tensors, config)
    except ValueError as error:
        raise damaged(f"the adapter in {str(folder)!r}", str(error)) from error
    return config, layer_tensors(tensors)


def adapter_folder(name: str | Path) -> Path:
    """The folder of a MoE-Bias adapter, downloaded if it is on the Hub.

    Raises UserError where there is none, or one of another method.
    """
    folder, method = adapter_of_any_method(name)
    if method != MOE_BIAS:
        raise UserError(f"{str(name)!r} is an adapter of type {method!r}, not of {MOE_BIAS}")
    return folder


def adapter_of_any_method(name: str | Path) -> tuple[Path, str]:
    """The folder of a PEFT adapter, downloaded if it is on the Hub, and its method's name.

    Raises UserError where there is none.
    """
    folder = Path(name) if Path(name).is_dir() else _download(str(name))
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{str(name)!r} has no {file}: it is not a saved adapter")
    return folder, str(_method(folder / CONFIG_FILE))


def _method(path: Path) -> object:
    config = read_json(path, "adapter config")
    if not isinstance(config, dict):
        raise UserError(f"{str(path)!r} holds no JSON object")
    return config.get("peft_type")


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{name!r} is neither a folder nor an adapter that the Hub delivered") from error


def refuse_overwriting(folder: Path) -> None:
    """Raises UserError where it is a file, or holds an adapter already; what a killed run left there is removed."""
    if folder.is_file():
        raise UserError(f"`output` {str(folder)!r} is a file; name a folder")
    remove_left_overs(folder)
    if (folder / CONFIG_FILE).exists():
        raise UserError(f"`output` {str(folder)!r} holds an adapter already; name another folder or remove it")
