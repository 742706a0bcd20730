"""LoRA r = 8 on all linear layers (PEFT) as the update to compare with, in its fastest stock form.

Neither checkpointing nor a cache; the loss either PyTorch's chunked `linear_cross_entropy`, which never
holds all logits, or plain cross-entropy over all of them. Which of the two, and which shape of batch,
is fastest depends on the machine: `fastest` tries them.

Shapes: B sequences, L length, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corpus import random_ids
from moe_bias.backbone import Head, find_head
from side_by_side import take_turns, wait

TRIALS = 2


@dataclass(frozen=True)
class Form:
    """A step's batch, B sequences of L tokens, and whether its logits are made in chunks."""

    sequences: int
    length: int
    chunked: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequences * self.length

    def __str__(self) -> str:
        return f"{self.sequences} x {self.length}, {'chunks of logits' if self.chunked else 'all logits at once'}"


FORMS = {
    "cpu": [Form(4, 128), Form(4, 128, chunked=False), Form(8, 128), Form(2, 256)],
    "cuda": [Form(4, 128), Form(4, 512), Form(4, 512, chunked=False), Form(8, 512), Form(16, 512)],
}


class LoRAArm:
    """The model with LoRA in it. `step` takes one optimiser step on a form's batch and returns its tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._head: Head = find_head(model)[1]
        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, config).train()  # type: ignore[arg-type]
        self._backbone = adapted.get_base_model().base_model
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    @property
    def forms(self) -> list[Form]:
        """Those to try; the chunked loss knows only of heads that change nothing after the product."""
        forms = FORMS["cuda" if self._head.device.type == "cuda" else "cpu"]
        plain = self._head.transform.cap is None and self._head.transform.scale == 1
        return [form for form in forms if plain or not form.chunked]

    def step(self, form: Form) -> int:
        """Forward, backward and AdamW."""
        ids = random_ids(self._head.vocab_size, form.tokens).to(self._head.device)
        input_BL = ids.view(form.sequences, form.length)
        hidden_BLD = self._backbone(input_ids=input_BL, use_cache=False).last_hidden_state
        self._optimizer.zero_grad()
        self.loss(hidden_BLD[:, :-1].flatten(0, 1), input_BL[:, 1:].flatten(), form.chunked).backward()
        self._optimizer.step()
        return form.tokens

    def loss(self, hidden_TD: Tensor, target_T: Tensor, chunked: bool) -> Tensor:
        """The mean cross-entropy of the targets (T,) after hidden states (T, D), whole or by torch's chunks."""
        if not chunked:
            logits_TV = self._head.transform.apply(self._head.module(hidden_TD))
            return F.cross_entropy(logits_TV, target_T)
        weight_VD: Any = self._head.module.weight
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden_TD, weight_VD, target_T, options=options)

    def epoch(self, form: Form, tokens: int) -> Callable[[], int]:
        """As many steps as `tokens` hold, at least one."""
        steps = max(tokens // form.tokens, 1)

        def run() -> int:
            done = sum(self.step(form) for _ in range(steps))
            wait()
            return done

        return run


def fastest(arm: LoRAArm) -> tuple[Form, dict[str, float]]:
    """The form of most tokens per second, and the median rate of each that was tried, by its name."""
    forms = {str(form): form for form in arm.forms}
    rates = take_turns({name: arm.epoch(form, form.tokens) for name, form in forms.items()}, TRIALS)
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    return forms[max(medians, key=medians.__getitem__)], medians
