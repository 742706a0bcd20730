"""TRL's trainers for a MoE-Bias adapter: their arguments, callbacks, evaluation, checkpoints and cards, its cost.

    trainer = MoEBiasSFTTrainer("bundled", SFTConfig("out", learning_rate=1e-2), train_dataset=dataset)
    trainer.train()

What they add: `model` may also be a `Frozen`, or a name that `load` knows; `peft_config` is a `MoEBiasConfig`, by
default one whose `support_size` tokens are chosen on the training texts; `states_memory` bytes keep hidden states, so
that the backbone is run once for each row and not in every epoch. The stock trainers refuse such an adapter.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import broadcast, broadcast_object_list
from peft import PeftModel
from torch import Tensor
from trl.trainer.utils import create_model_from_path

from moe_bias.adapter import MoEBiasConfig
from moe_bias.adapter.head import MoEBiasHead
from moe_bias.backbone import Head, unwrapped
from moe_bias.features.extract import CALIBRATION_TOKENS, measure_fork_mass, support_for
from moe_bias.frozen import Frozen, resolve_model
from moe_bias.layer import MoEBiasLayer, load_balance_loss
from moe_bias.mistakes import UserError, shown
from moe_bias.tasks.conversations import answer_ends
from moe_bias.trl.forward import IGNORED, AdaptedForward, FirstTokens
from moe_bias.trl.states import RowStates

SUPPORT_SIZE = 4096
STATES_MEMORY = 2**31
_LOWEST_RATE = 1e-3
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_TEXTS_AT_ONCE = 8
_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # TRL's own class comes after it, whichever it is


class _AtTheHead(_Trainer):
    """What the trainers share, before TRL's own class in the order of methods."""

    temperature = 1.0
    """Of the distribution that is scored; `GRPOTrainer` sets its own."""

    def __init__(
        self,
        model: Any,
        *args: Any,
        support_size: int | None = SUPPORT_SIZE,
        states_memory: int = STATES_MEMORY,
        **kwargs: Any,
    ) -> None:
        """As TRL's; see the file's docstring for what is added.

        `support_size` tokens are chosen where the config names none (None: all tokens are the support). Raises
        UserError on a config of another method, and on what would pass the adapter by.
        """
        given = inspect.signature(super().__init__).bind_partial(model, *args, **kwargs).arguments
        settings = given.get("args")
        _refuse(settings)
        if isinstance(model, Frozen):
            kwargs.setdefault("processing_class", model.tokenizer)
        base, is_adapted = _base_of(model, settings)
        self._support_size = None
        if not is_adapted:
            own = copy.copy(_own_config(given.get("peft_config")))
            if own.support is None and support_size is not None:
                self._support_size = min(support_size, base.get_output_embeddings().out_features)
                own.support = list(range(self._support_size))  # in whose place those come that are chosen
                _refuse_entries(own)
            kwargs["peft_config"] = own
        with _head_hidden(base):
            super().__init__(model if is_adapted else base, *args, **kwargs)
        self._put_forward(base, states_memory)
        if self.args.learning_rate < _LOWEST_RATE:
            _log.warning(
                "learning_rate is %g, which is right for a whole model; a MoE-Bias layer wants about 1e-2",
                self.args.learning_rate,
            )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss and, in training, the load-balance loss of the config's weight (arXiv 2101.03961)."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        routing = self._forward.take_routing()
        weight = self._layer.config.load_balance_weight
        if routing is None or not weight or not self._layer.config.has_router:
            return found
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        balance = weight * load_balance_loss(routing) / steps
        return (found[0] + balance, found[1]) if return_outputs else found + balance

    @property
    def _layer(self) -> MoEBiasLayer:
        layer = self._placed.moe_bias_layers[self._name]
        assert isinstance(layer, MoEBiasLayer)
        return layer

    @property
    def _entropy_has_gradient(self) -> bool:
        """Whether the loss reads the entropy."""
        return False

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        """The labels (B, L) of a batch that the data collator made."""
        return batch["labels"]

    def _put_forward(self, base: Any, memory: int) -> None:
        placed = base.get_output_embeddings()
        assert isinstance(placed, MoEBiasHead)
        self._placed, self._name = placed, placed.active_adapters[0]
        self._head = Head(placed.base_layer, placed.transform)
        self.states = RowStates(base, self._head, self.temperature, memory)
        on_first: FirstTokens | None = None
        if not _is_fresh(self._layer):
            self.states.begin(self._layer.support_or_all())
        elif self.train_dataset is None:
            on_first = self._begin
        else:
            on_first = self._begin_on_texts()
        self._forward = AdaptedForward(placed, self.states, self.temperature, self._entropy_has_gradient, on_first)
        self._forward.put_into(base)

    def _begin_on_texts(self) -> FirstTokens | None:
        """Begins on the first training texts, the same ones in every process."""
        examples = iter(self.train_dataset)
        parts: list[tuple[Tensor, Tensor]] = []
        while sum(len(token_T) for _, token_T in parts) < CALIBRATION_TOKENS:
            some = list(islice(examples, _TEXTS_AT_ONCE))
            if not some:
                break
            batch = self.data_collator(some)
            inputs = {name: batch[name].to(self._head.device) for name in _INPUTS if name in batch}
            next_BL = self._labels(batch)[:, 1:].to(self._head.device)
            parts.append(self.states.hidden_of(inputs, next_BL != IGNORED, next_BL))
        self._begin(*map(torch.cat, zip(*parts, strict=True)))
        return None

    def _begin(self, hidden_TD: Tensor, token_T: Tensor) -> None:
        """Chooses the support and measures the normalisation on a fresh adapter's first tokens, those of rank 0."""
        layer, size = self._layer, self._support_size
        hidden_TD, token_T = hidden_TD[:CALIBRATION_TOKENS], token_T[:CALIBRATION_TOKENS].cpu()
        config = self.model.peft_config[self._name]
        if size is not None:
            ends = answer_ends(self.model.get_base_model(), self.processing_class)
            chosen = [support_for(measure_fork_mass(self._head, hidden_TD.float()), token_T, size, ends)]
            config.support = broadcast_object_list(chosen)[0]
            layer.change_support(config.support)
        layer.calibrate(hidden_TD)
        for column in (layer.hidden_mean, layer.hidden_scale):
            column.copy_(broadcast(column))
        self.states.begin(layer.support_or_all())


class MoEBiasSFTTrainer(_AtTheHead, trl.SFTTrainer):
    """`trl.SFTTrainer` of a MoE-Bias adapter: see the file's docstring."""


class MoEBiasDPOTrainer(_AtTheHead, trl.DPOTrainer):
    """`trl.DPOTrainer` of a MoE-Bias adapter; its reference is the model without it."""

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)


class MoEBiasGRPOTrainer(_AtTheHead, trl.GRPOTrainer):
    """`trl.GRPOTrainer` of a MoE-Bias adapter; a fresh one begins on the first answers that are sampled."""

    def _begin_on_texts(self) -> FirstTokens | None:
        return self._begin

    @property
    def _entropy_has_gradient(self) -> bool:
        return bool(self.args.entropy_coef) or self.args.use_adaptive_entropy


def _refuse(settings: Any) -> None:
    """Raises UserError on what would go past the adapter."""
    if getattr(settings, "use_vllm", False):
        raise UserError(
            "`use_vllm` merges an adapter into the weights of vLLM's model, which a MoE-Bias layer cannot be; leave it "
            "out, or use moe_bias.train_rl, which samples by vLLM"
        )
    if getattr(settings, "use_liger_kernel", False):
        raise UserError("`use_liger_kernel` puts another forward in the model's place; leave it out")


def _base_of(model: Any, settings: Any) -> tuple[Any, bool]:
    """The model of transformers, and whether there is a MoE-Bias adapter on it already."""
    if isinstance(model, Frozen):
        return model.model, False
    if isinstance(model, str):
        return create_model_from_path(
            resolve_model(model), **(getattr(settings, "model_init_kwargs", None) or {})
        ), False
    if not isinstance(model, PeftModel):
        return model, False
    base = model.get_base_model()
    if not isinstance(base.get_output_embeddings(), MoEBiasHead):
        raise UserError(f"`model` has an adapter of {type(model.base_model).__name__}; TRL's own trainers train that")
    return base, True


def _own_config(given: Any) -> MoEBiasConfig:
    if given is None:
        return MoEBiasConfig()
    if not isinstance(given, MoEBiasConfig):
        raise UserError(f"`peft_config` is {shown(given)}, no MoEBiasConfig; TRL's own trainers train other methods")
    return given


def _refuse_entries(config: MoEBiasConfig) -> None:
    if config.layer_config().has_entries:
        raise UserError(
            "experts with entries of their own belong to the tokens that they are made for: name those in the config's "
            "`support`, or give `support_size=None` for all"
        )


@contextmanager
def _head_hidden(base: Any) -> Iterator[None]:
    """TRL refuses an adapter on the head, because its own forward would go past it: here that forward is replaced."""
    original = base.get_output_embeddings
    base.get_output_embeddings = lambda: unwrapped(original())
    try:
        yield
    finally:
        del base.get_output_embeddings


def _is_fresh(layer: MoEBiasLayer) -> bool:
    """Whether nothing was measured for it yet."""
    return not layer.hidden_mean.any() and bool((layer.hidden_scale == 1).all())
