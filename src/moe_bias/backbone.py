"""The frozen model's output embedding, what happens to logits after it, hidden states.

Many architectures change logits after the output embedding: a soft-cap (Gemma 2), a scale (Cohere,
Granite, Falcon-H1). `measure_head_transform` finds out by feeding known logits through the model's
own forward, with the backbone taken out, and fits `final = cap tanh(scale z / cap)`. A model whose
forward does anything else is refused: its entropies and biases would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from moe_bias.chunks import PACKED_LOGITS
from moe_bias.config import LayerConfig
from moe_bias.layer import MoEBiasLayer, at_least_float32
from moe_bias.mistakes import UserError, reason_of

SHIFTED = "reads_shifted_hidden_states"
"""Attribute of an output embedding while an adapter shifts what it reads; a copy of the model has it too."""
_UNIT_VECTORS = 64
"""Columns of a packed or offloaded output embedding that are read at once."""
_CAP_MARGIN = 1e-4
"""Adjusted logits are kept this relative distance inside the soft-cap, which float32 can still invert."""
_BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1: a saturated logit that is not moved has a finite inverse, so finite gradients."""


@dataclass(frozen=True)
class HeadTransform:
    """`final = cap tanh(scale z / cap)` of the output embedding's logits z; no cap: `scale z`."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Final logits of raw ones, in float32 or better."""
        scaled = at_least_float32(raw)
        scaled = scaled if self.scale == 1.0 else scaled * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def reachable(self, final: Tensor, move: Tensor) -> Tensor:
        """The part of `move` that the final logits can make: a soft-cap bounds them to (-cap, cap)."""
        if self.cap is None:
            return move
        return torch.where(move == 0, move, self._bounded(final, move) - final)

    def raw_move(self, raw: Tensor, move: Tensor) -> Tensor:
        """What to add to the raw logits so that the final ones move by `move`; exactly 0 for 0.

        The raw logits are needed, and not only the final ones: near the soft-cap many raw logits
        have the same final one. Where the move is 0 the gradient still is that of the formula: every
        fresh layer starts there.
        """
        if self.cap is None:
            return move if self.scale == 1.0 else move / self.scale
        final = self.apply(raw)
        target = self._bounded(final, move)
        level = (target / self.cap).clamp(-_BELOW_ONE, _BELOW_ONE)
        needed = torch.atanh(level) * (self.cap / self.scale) - at_least_float32(raw)
        return torch.where((move == 0) | (target == final), needed - needed.detach(), needed)

    def _bounded(self, final: Tensor, move: Tensor) -> Tensor:
        """`final + move`, inside the soft-cap's margin; a logit already beyond that goes no further."""
        assert self.cap is not None
        edge = self.cap * (1 - _CAP_MARGIN)
        return torch.minimum(torch.maximum(final + move, final.clamp(max=-edge)), final.clamp(min=edge))


class OutputRows:
    """Rows of an output embedding's weight, read where they are when they are asked for: see `EmbeddingRows`.

    A weight that is packed (quantised) or elsewhere (offloaded) is read by the module's own product with unit vectors,
    which gives its rows as the module computes with them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputRows:
        """Of the copied model, where the model is copied too; else of the same one: a layer's copy is no model's."""
        return OutputRows(memo.get(id(self._module), self._module))

    def state(self) -> tuple[object, ...]:
        """Changes when the weight is replaced or written to."""
        weight = getattr(self._module, "weight", None)
        if not isinstance(weight, Tensor):
            return ()
        return weight.data_ptr(), -1 if weight.is_inference() else weight._version, weight.dtype, weight.device

    @torch.no_grad()
    def __call__(self, token_M: Tensor | None) -> Tensor:
        """The rows of some tokens (M, D), of all for None; in float32 or better, on the module's device."""
        weight: Any = getattr(self._module, "weight", None)
        if self.are_packed or (weight.is_meta and offload_hook(self._module) is not None):
            return self._products(token_M)
        weight = weight.detach()
        return at_least_float32(weight if token_M is None else weight[token_M.to(weight.device)])

    @property
    def are_packed(self) -> bool:
        """Whether the weight is no plain matrix of numbers: the module's product may then round what it multiplies."""
        module: Any = self._module
        weight: Any = getattr(module, "weight", None)
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            return True
        # Numbers of 8 bits have a scale beside them.
        return weight.dtype.itemsize < 2 or tuple(weight.shape) != (module.out_features, module.in_features)

    def _products(self, token_M: Tensor | None) -> Tensor:
        module: Any = self._module
        device, dtype = _computes_on(module)
        zero = module(torch.zeros(1, module.in_features, device=device, dtype=dtype))
        parts = []
        for unit_CD in torch.eye(module.in_features, device=device, dtype=dtype).split(_UNIT_VECTORS):
            column_CV = at_least_float32(module(unit_CD)) - at_least_float32(zero)
            parts.append(column_CV if token_M is None else column_CV[:, token_M.to(column_CV.device)])
        return torch.cat(parts).T.contiguous()


@dataclass(frozen=True)
class Head:
    """The output embedding as a function: final logits from hidden states."""

    module: nn.Module
    transform: HeadTransform

    @property
    def hidden_size(self) -> int:
        """D, from the module: packed weights and padded vocabularies make other sources wrong."""
        return int(self.module.in_features)  # type: ignore[arg-type]

    @property
    def vocab_size(self) -> int:
        """V, the rows of the output embedding, which may exceed the tokenizer's tokens."""
        return int(self.module.out_features)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the output embedding computes."""
        return _computes_on(self.module)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type that the output embedding takes hidden states in."""
        return _computes_on(self.module)[1]

    @property
    def rows(self) -> OutputRows:
        """The rows of the output embedding's weight."""
        return OutputRows(self.module)

    def layer(self, config: LayerConfig) -> MoEBiasLayer:
        """A fresh layer at this head. Raises ValueError where the support names ids outside the vocabulary."""
        return MoEBiasLayer(config, self.hidden_size, self.vocab_size, self.rows)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final logits (..., V) in float32 or better of hidden states (..., D)."""
        return self.transform.apply(self.module(hidden))

    @torch.no_grad()
    def columns(self, support_M: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from hidden states (..., D) to the final logits of the support (..., M), rounded as the module's.

        Those of a packed weight are taken from the product with all of it, some hidden states at a time.
        """
        if self.rows.are_packed:
            return lambda hidden: self._of_all(hidden, lambda logits_CV, _: logits_CV[:, support_M], len(support_M))
        weight_MD, bias_M = self._rows(support_M)
        dtype = self.dtype

        @torch.no_grad()
        def support_logits(hidden: Tensor) -> Tensor:
            return self.transform.apply(_rounded(F.linear(hidden.to(weight_MD.dtype), weight_MD, bias_M), dtype))

        return support_logits

    @torch.no_grad()
    def token_logits(self, hidden_TD: Tensor, token_T: Tensor) -> Tensor:
        """The final logit (T,) of one token for each hidden state (T, D)."""
        if self.rows.are_packed:
            return self._of_all(hidden_TD, lambda logits_CV, rows: logits_CV.gather(-1, token_T[rows, None]), 1)[:, 0]
        weight_TD, bias_T = self._rows(token_T)
        raw_T = torch.linalg.vecdot(hidden_TD.to(weight_TD.dtype), weight_TD)
        return self.transform.apply(_rounded(raw_T if bias_T is None else raw_T + bias_T, self.dtype))

    @torch.no_grad()
    def _of_all(self, hidden: Tensor, choose: Callable[[Tensor, slice], Tensor], count: int) -> Tensor:
        """`count` final logits (..., count) that `choose` takes from all (C, V) of some hidden states, at a slice."""
        hidden_TD = hidden.reshape(-1, self.hidden_size).to(self.dtype)
        size = PACKED_LOGITS.rows(self.vocab_size, hidden.device)
        parts = [
            choose(self.logits(hidden_TD[start : start + size]), slice(start, start + size))
            for start in range(0, len(hidden_TD), size)
        ]
        chosen = torch.cat(parts) if parts else hidden_TD.new_empty(0, count, dtype=torch.float32)
        return chosen.view(*hidden.shape[:-1], count)

    def _rows(self, token: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of some tokens, in float32 or better."""
        bias = getattr(self.module, "bias", None)
        return self.rows(token), None if bias is None else at_least_float32(self._bias()[token])

    def _bias(self) -> Tensor:
        """The output embedding's own bias (V,), wherever it is kept."""
        bias: Any = self.module.bias
        if not bias.is_meta or offload_hook(self.module) is None:
            return cast(Tensor, bias)
        zero: Tensor = self.module(torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype))
        return zero[0]


def _rounded(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits as a module of this type gives them: in bfloat16 they would differ from it by a hundredth of a nat, and
    log Z, R and A, which are of the module's own, would be of another distribution.
    """
    return raw if dtype.itemsize >= raw.dtype.itemsize else raw.to(dtype).to(raw.dtype)


def adapted_logits(
    layer: MoEBiasLayer, transform: HeadTransform, hidden_BD: Tensor, entropy_B: Tensor, logits_BV: Tensor
) -> Tensor:
    """Final logits (B, V) under the layer, from the base's final logits and their entropy in nats."""
    return with_bias(layer, transform, logits_BV, layer(hidden_BD, entropy_B).bias)


def with_bias(layer: MoEBiasLayer, transform: HeadTransform, logits: Tensor, bias: Tensor) -> Tensor:
    """Final logits (..., V) of the base, moved by the layer's strength times its bias (..., M) on its support."""
    return moved_logits(transform, logits, layer.strength * bias, layer.support)


def moved_logits(transform: HeadTransform, logits: Tensor, move: Tensor, support: Tensor | None) -> Tensor:
    """Final logits (..., V) of the base, moved by `move` (..., M) on a support (M,), None being all of them."""
    if support is None:
        return logits + transform.reachable(logits, move)
    columns = logits.index_select(-1, support)
    return logits.index_copy(-1, support, columns + transform.reachable(columns, move))


def _computes_on(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and type that a module takes its input in; accelerate keeps an offloaded one's weights on 'meta'."""
    hook = offload_hook(module)
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if hook is None else hook.execution_device
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return torch.device(device), floating[0] if floating else torch.float32


def offload_hook(module: nn.Module) -> Any:
    """What accelerate brings an offloaded module's weights with when it computes; None where they stay."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def find_head(model: nn.Module) -> tuple[nn.Module, Head]:
    """The output embedding as it stands in the model (perhaps wrapped by an adapter), and as a Head.

    Raises ValueError where the model has none, where it is not linear, or where its forward does
    something unknown to the logits.
    """
    placed = output_embedding(model)
    return placed, Head(unwrapped(placed), measure_head_transform(model))


def output_embedding(model: nn.Module) -> nn.Module:
    """The module that makes logits. Raises ValueError where there is none or it is not linear."""
    getter = getattr(model, "get_output_embeddings", None)
    placed = getter() if getter is not None else None
    if not isinstance(placed, nn.Module):
        raise UserError(f"{_class_of(model)} has no output embedding: MoE-Bias needs a language model head")
    linear = unwrapped(placed)
    if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
        raise UserError(f"the output embedding of {_class_of(model)} is a {type(linear).__name__}, not a linear layer")
    return placed


@torch.no_grad()
def measure_head_transform(model: nn.Module) -> HeadTransform:
    """Fits what the model's forward does to logits after the output embedding.

    Runs the model's own forward on known logits, with backbone and output embedding replaced, so it
    costs nothing and works on the meta device. Raises ValueError naming the class where the forward
    cannot be probed or is not of the form that `HeadTransform` describes.
    """
    raw_V = _probe_logits(int(output_embedding(model).out_features))  # type: ignore[arg-type]
    final_V = _forward_of_known_logits(model, raw_V)
    tiny, huge = final_V[1] / raw_V[1], float(final_V[0])
    scale = float(tiny)
    cap = None if scale and abs(huge / (scale * float(raw_V[0])) - 1) < 1e-3 else huge
    fitted = HeadTransform(scale, cap)
    if not torch.allclose(fitted.apply(raw_V), final_V, rtol=1e-4, atol=1e-5):
        raise UserError(f"{_class_of(model)} changes its logits after the output embedding in a way not known here")
    return fitted


@contextmanager
def captured_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, the output embedding computes nothing and its inputs are appended to the list.

    The model's own forward runs up to the exact hidden states that the output embedding reads; its
    logits are one zero per position, so no memory is spent on the vocabulary. Raises UserError while an
    adapter shifts them: they would not be the base model's.
    """
    if getattr(unwrapped(output_embedding(model)), SHIFTED, False):
        raise UserError(
            "the model's hidden states are shifted by an adapter; take the shift away, with its remove(), to read them"
        )
    seen: list[Tensor] = []

    def capture(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden.detach())
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with _replaced_forward(output_embedding(model), capture):
        yield seen


@torch.inference_mode()
def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (B, L, D) that the output embedding reads, for token ids (B, L)."""
    with captured_hidden(model) as seen:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return seen[0]


def _probe_logits(vocab_size: int) -> Tensor:
    """(V,) float32: one huge value, one tiny, then a ramp through what models produce."""
    raw = torch.linspace(-60, 60, vocab_size)
    raw[0], raw[1] = 1e6, 2.0**-10
    return raw


class _EmptyBackboneOutput(BaseModelOutputWithPast):
    """What a backbone returns, with None for every field that an architecture adds to it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The module whose hidden states the output embedding reads; None where it is not apart from the model.

    Llama 4's `base_model` names no module of its text model, and the model with images has that one inside.
    """
    for name in ("base_model", "model"):
        found = getattr(model, name, None)
        if isinstance(found, nn.Module) and found is not model:
            return found
    inner = getattr(model, "language_model", None)
    return backbone_of(inner) if isinstance(inner, nn.Module) else None


def _forward_of_known_logits(model: nn.Module, raw_V: Tensor) -> Tensor:
    """The final logits (V,) float32 on the CPU that the model's own forward makes of raw ones."""
    backbone = backbone_of(model)
    if backbone is None:
        raise UserError(f"{_class_of(model)} has no separate backbone, so its forward cannot be checked")
    head: Any = output_embedding(model)
    config = getattr(model, "config", None)
    wider = getattr(config.get_text_config(), "hidden_size", head.in_features) if config is not None else 0
    reason = ""
    # Most backbones end as wide as the head; after others (ELECTRA, RemBERT) the model goes down to its width.
    for width in dict.fromkeys((int(head.in_features), int(wider))):
        try:
            final = _forward_without_backbone(model, backbone, width, raw_V)
        except Exception as error:  # of the model's own code, on a backbone's output that is not its own
            reason = reason or reason_of(error)
            continue
        if final.numel() != raw_V.numel():
            raise UserError(f"{_class_of(model)} cuts its logits from {raw_V.numel()} to {final.numel()} entries")
        return final.detach().float().flatten().cpu()
    raise UserError(f"the forward of {_class_of(model)} cannot be checked without its backbone ({reason})")


def _forward_without_backbone(model: nn.Module, backbone: nn.Module, width: int, raw_V: Tensor) -> Tensor:
    head = output_embedding(model)
    device, dtype = _computes_on(unwrapped(head))
    output = _EmptyBackboneOutput(last_hidden_state=torch.zeros(1, 1, width, device=device, dtype=dtype))
    raw_11V = raw_V.to("cpu" if device.type == "meta" else device).expand(1, 1, -1)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def known(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.numel() != hidden.shape[-1]:
            raise UserError(f"its output embedding reads {tuple(hidden.shape)} for one token")
        return raw_11V.clone()

    with _replaced_forward(backbone, lambda *args, **kwargs: output), _replaced_forward(head, known):
        final: Tensor = model(input_ids=ids).logits
    return final


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward; one set on the instance (as accelerate does) is put back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def unwrapped(module: nn.Module) -> nn.Module:
    """The module under an adapter, or the module itself."""
    getter: Any = getattr(module, "get_base_layer", None)
    return module if getter is None else getter()


def _class_of(model: nn.Module) -> str:
    return type(model).__name__
