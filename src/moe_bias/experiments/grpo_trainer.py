"""TRL's GRPOTrainer on a model with LoRA, with DAPO's settings, and the model as it was afterwards.

The objective is DAPO's over all tokens, or over those of high entropy (RLVR-High-Entropy):

    loss_type="dapo", epsilon 0.2, epsilon_high 0.28, beta 0, advantages scaled by the group's standard
    deviation, truncated completions kept, top_entropy_quantile 1.0 or 0.2

How TRL's loss then differs from ours: see `objectives` and `advantage`. TRL takes its entropy threshold over each
micro-batch, not over the step. All samples of a step's prompts make one optimiser step, so that TRL
takes its own log-probabilities, detached, for those of the sampler. AdamW without weight decay,
gradients clipped to norm 1, a rate that falls linearly to 0.

TRL's config turns bfloat16 on unless told otherwise; here the update is in the model's own type. It
also leaves changes on the model (a forward of its own, no KV cache, tags), which are taken back.
An answer ends where the adapter's own end: TRL takes the ends from the model's `generation_config`.
In place of transformers' `generate` the model samples as it does for the adapter's own arms (`decoding`): the same
distribution, by other random numbers, with finished rows dropped and on a GPU by a graph, so that seconds compare.
TRL counts its users on the Hub unless HF_HUB_DISABLE_TELEMETRY=1 is set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from moe_bias.backbone import Head, find_head
from moe_bias.extras import need
from moe_bias.mistakes import UserError
from moe_bias.progress import meter
from moe_bias.records import temporary_folder
from moe_bias.rollout.decoding import answer_batch
from moe_bias.rollout.draw import draw
from moe_bias.tasks.conversations import answer_ends
from moe_bias.training.objectives import EPS_HIGH, EPS_LOW

Prompt = str | list[dict[str, str]]
"""Text to be continued, or the turns of a chat, to which the tokenizer's template is applied."""


@dataclass(frozen=True)
class GRPOChoices:
    """How long and how large: `steps` of `prompts` x `group` samples of at most `max_new_tokens` tokens.

    `rho` is the share of the tokens, those of highest entropy, that are learnt from, 1.0 for all; `micro_batch`
    samples are in one forward and backward pass. `scaled`: whether TRL divides by a group's standard deviation.
    """

    steps: int
    prompts: int
    group: int
    max_new_tokens: int
    temperature: float = 1.0
    rho: float = 1.0
    rate: float = 1e-4
    micro_batch: int = 8
    seed: int = 0
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"a group of {self.group} samples has no advantages: take 2 or more")
        if self.samples % self.micro_batch:
            raise UserError(
                f"{self.prompts} prompts x {self.group} samples do not divide into micro-batches of {self.micro_batch}"
            )
        if not 0 < self.rho <= 1:
            raise UserError(f"`rho` is {self.rho}, a share of the tokens: it must be above 0 and at most 1")

    @property
    def samples(self) -> int:
        """Samples in one step."""
        return self.prompts * self.group


def check_trl() -> None:
    """Raises UserError where TRL is missing."""
    need("trl", "LoRA by reinforcement learning")


@contextmanager
def grpo_trainer(
    adapted: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: Callable[..., Any],
    choices: GRPOChoices,
    by_generate: bool = False,
) -> Iterator[Any]:
    """TRL's trainer of this model, without output of its own; afterwards no file and no change is left of it.

    `by_generate`: samples by transformers' `generate`, as TRL does by itself.
    """
    check_trl()
    if len(prompts) < choices.prompts:
        raise UserError(f"{len(prompts)} prompts are too few for steps of {choices.prompts} prompts")
    import trl
    from datasets import Dataset

    head = find_head(adapted.get_base_model())[1]  # before TRL puts a forward of its own in place
    with temporary_folder("trl") as folder, _as_found(adapted):
        is_chat = not isinstance(prompts[0], str)
        adapted.get_base_model().generation_config.eos_token_id = answer_ends(adapted, tokenizer, is_chat) or None
        trainer = trl.GRPOTrainer(
            adapted,
            reward_funcs=reward,
            args=trl.GRPOConfig(str(folder), **_arguments(adapted, choices)),
            train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        if not by_generate:
            adapted.generate = Sampling(adapted, head, choices.group)
        yield trainer


def _arguments(adapted: Any, choices: GRPOChoices) -> dict[str, Any]:
    parameter = next(adapted.parameters())
    return {
        "loss_type": "dapo",
        "epsilon": EPS_LOW,
        "epsilon_high": EPS_HIGH,
        "beta": 0.0,
        "scale_rewards": "group" if choices.scaled else "none",
        "mask_truncated_completions": False,
        "top_entropy_quantile": choices.rho,
        "temperature": choices.temperature,
        "max_completion_length": choices.max_new_tokens,
        "num_generations": choices.group,
        "per_device_train_batch_size": choices.micro_batch,
        "gradient_accumulation_steps": choices.samples // choices.micro_batch,
        "max_steps": choices.steps,
        "learning_rate": choices.rate,
        "seed": choices.seed,
        "bf16": parameter.dtype == torch.bfloat16,
        "use_cpu": parameter.device.type == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


@dataclass(frozen=True)
class Sampling:
    """What TRL calls in place of `generate`. Random numbers are torch's own, which TRL seeds."""

    adapted: Any
    head: Head
    group: int

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **_: Any) -> Tensor:
        """Prompts and completions (B, L), left- and right-padded, of left-padded prompts, each `group` times or not."""
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        is_grouped = all(prompt == prompts[i - i % self.group] for i, prompt in enumerate(prompts))
        copies = self.group if is_grouped and len(prompts) % self.group == 0 else 1

        def choose(hidden_BD: Tensor, number_B: Tensor, step: int) -> Tensor:
            uniform_B = torch.rand(len(hidden_BD), dtype=torch.float64, device=hidden_BD.device)
            return draw(self.head.logits(hidden_BD) / generation_config.temperature, uniform_B).token

        ends = generation_config.eos_token_id
        with meter("", len(prompts), "samples", visible=False) as bar:
            answers = answer_batch(
                self.adapted,
                prompts[::copies],
                copies,
                choose,
                stop_ids=[ends] if isinstance(ends, int) else ends or [],
                limit=generation_config.max_new_tokens,
                bar=bar,
            )
        longest = max(len(answer.all_ids) for answer in answers)
        pad = generation_config.pad_token_id
        rows = [answer.all_ids + [pad] * (longest - len(answer.all_ids)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], dim=-1)


@contextmanager
def _as_found(adapted: Any) -> Iterator[None]:
    """Takes back what TRL does to a model beside training it."""
    model, modes = adapted.get_base_model(), [(module, module.training) for module in adapted.modules()]
    text_config = model.config.get_text_config()
    before = {name: model.__dict__.get(name) for name in ("forward", "model_tags")}
    use_cache, pad_token_id = getattr(text_config, "use_cache", None), text_config.pad_token_id
    generation_config = copy.deepcopy(model.generation_config)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                model.__dict__.pop(name, None)
            else:
                setattr(model, name, value)
        adapted.__dict__.pop("generate", None)
        text_config.use_cache, text_config.pad_token_id = use_cache, pad_token_id
        model.generation_config = generation_config
        for module, training in modes:
            module.training = training
