"""The model's forward as TRL's trainers call it, with `fused_lm_head=True`, for an adapter at its head.

TRL multiplies hidden states by the head's weight itself, which would leave an adapter out; the output here is the
adapted model's, of the same fields, and the backbone is run without gradient, once for each row.

Shapes: B rows, L positions, T scored tokens.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from moe_bias.adapter.head import MoEBiasHead
from moe_bias.backbone import Head
from moe_bias.layer import Routing
from moe_bias.mistakes import UserError
from moe_bias.trl.scores import Scores, scores_of
from moe_bias.trl.states import RowStates

IGNORED = -100
"""The label of a token that is not scored."""
_FIELDS = {
    "log_probs": "log_prob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_squares",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
"""TRL's names, and ours."""
_NOT_KNOWN = ("pixel_values", "inputs_embeds", "past_key_values")
FirstTokens = Callable[[Tensor, Tensor], None]
"""What is told of the hidden states (T, D) and tokens (T,) of the first batch, before there is a support."""


class AdaptedForward:
    """`model.forward` while a trainer has it: calls without `fused_lm_head` go to the one before."""

    def __init__(
        self,
        placed: MoEBiasHead,
        states: RowStates,
        temperature: float,
        entropy_has_gradient: bool,
        on_first: FirstTokens | None,
    ) -> None:
        self._placed, self._states, self._temperature = placed, states, temperature
        self._head = Head(placed.base_layer, placed.transform)
        self._entropy_has_gradient, self._on_first = entropy_has_gradient, on_first
        self._routing: Routing | None = None

    def put_into(self, model: PreTrainedModel) -> None:
        """Makes it the model's forward, in place of TRL's."""
        original = types.MethodType(type(model).forward, model)

        @functools.wraps(type(model).forward)  # whose parameters `generate` looks at
        def forward(
            model: PreTrainedModel,
            *args: Any,
            fused_lm_head: bool = False,
            labels: Tensor | None = None,
            shift_labels: Tensor | None = None,
            num_items_in_batch: Any = None,
            **inputs: Any,
        ) -> Any:
            if fused_lm_head:
                return self._scored(inputs, labels, shift_labels, num_items_in_batch)
            others = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in others.items() if value is not None}
            return original(*args, **given, **inputs)

        model.forward = types.MethodType(forward, model)

    def take_routing(self) -> Routing | None:
        """That of the last forward in training since the last call, with its graph."""
        routing, self._routing = self._routing, None
        return routing

    def _scored(
        self, inputs: dict[str, Any], labels: Tensor | None, shift_labels: Tensor | None, num_items: Any
    ) -> FusedCausalLMOutput:
        for name in _NOT_KNOWN:
            if inputs.get(name) is not None:
                raise UserError(f"a batch with {name!r} cannot be scored by its tokens; train on text alone")
        inputs.pop("output_router_logits", None)
        next_BL = labels[:, 1:] if shift_labels is None and labels is not None else shift_labels
        assert next_BL is not None
        scored_BL = next_BL != IGNORED
        layer = self._placed.shifting()  # which counts as applied: this forward goes past the head
        if self._on_first is not None:
            self._on_first(*self._states.hidden_of(inputs, scored_BL, next_BL))
            self._on_first = None
            layer = self._placed.shifting()
        seen = self._states.of(inputs, scored_BL, next_BL)
        with torch.autocast(scored_BL.device.type, enabled=False):
            scores, routing = scores_of(layer, self._head, seen, self._temperature, self._entropy_has_gradient)
        self._placed.shifting()  # the backbone may have been run meanwhile, by a forward of its own
        if torch.is_grad_enabled() and self._placed.training:  # a reference's comes after it
            self._routing = routing
        return _output(scores, scored_BL, num_items)


def _output(scores: Scores, scored_BL: Tensor, num_items: Any) -> FusedCausalLMOutput:
    """Per-token fields (B, L), 0 where nothing is scored."""
    fields = {}
    for theirs, ours in _FIELDS.items():
        value_T = getattr(scores, ours).to(scored_BL.device)
        fields[theirs] = value_T.new_zeros(scored_BL.shape).masked_scatter(scored_BL, value_T)
    count = scored_BL.sum().clamp(min=1) if num_items is None else num_items
    return FusedCausalLMOutput(loss=-fields["log_probs"].sum() / count, label_mask=scored_BL, **fields)
