"""LoRA by reinforcement learning with TRL: the arms that the adapter's own RL is compared with.

`grpo_trainer` has the objective and the settings. `sampler_trainer_gap` measures how far apart TRL's
log-probabilities in sampling and in training are, which its loss takes to be equal.

Shapes: B samples, L completion length, V vocabulary, T valid tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from moe_bias.experiments.grpo_trainer import GRPOChoices, Prompt, grpo_trainer
from moe_bias.progress import Meter, meter
from moe_bias.records import peak_bytes
from moe_bias.training.advantage import Advantage

RewardFunction = Callable[[list[Prompt], list[str], list[int]], Sequence[float]]
"""From prompts, completion texts, special tokens left out, and tokens, end token included, of a step's samples to one
reward for each."""


@dataclass(frozen=True)
class GRPOReport:
    """What training took and gave.

    `sampled_tokens` include end tokens; `seconds` are all, and apart those of sampling, of the reward
    function and of the update. `peak_bytes`: on a GPU the most that was allocated in training, on a CPU
    the most that the process has held since it began. `mean_rewards` has one for each step.
    """

    steps: int
    samples: int
    sampled_tokens: int
    seconds: float
    sampling_seconds: float
    reward_seconds: float
    updating_seconds: float
    peak_bytes: int
    parameters: int
    mean_rewards: tuple[float, ...]


@dataclass(frozen=True)
class LogProbGap:
    """|log-probability in sampling - in training| of the same tokens: its largest and mean, over `tokens`."""

    largest: float
    mean: float
    tokens: int


def train_grpo_lora(
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward_function: RewardFunction,
    choices: GRPOChoices,
    description: str = "LoRA by GRPO",
    after_step: Callable[[int], None] | None = None,
    advantage: Advantage | None = None,
) -> GRPOReport:
    """Trains the LoRA weights of `adapted` (see `lora.lora_on`) in place.

    `after_step` is called with the count of steps taken; its time is not counted. `advantage` says what samples are
    worth among those of their prompt (None: TRL does): TRL is given that in place of rewards, and scales nothing.
    Raises UserError where TRL is missing or there are fewer prompts than one step takes. Sets the
    global random seeds, as TRL does.
    """
    parameters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    device = next(adapted.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with meter(description, choices.steps, "steps") as bar:
        worth = None if advantage is None else partial(_advantages, advantage, choices.group)
        watch = _Watch(reward_function, bar, device, after_step, worth)
        choices = choices if advantage is None else replace(choices, scaled=False)
        started = watch.now()
        with grpo_trainer(adapted, tokenizer, prompts, watch.reward, choices) as trainer:
            trainer.add_callback(watch)
            trainer.train()
        seconds = watch.now() - started - watch.paused
    adapted.eval()
    return GRPOReport(
        steps=len(watch.mean_rewards),
        samples=len(watch.mean_rewards) * choices.samples,
        sampled_tokens=watch.sampled_tokens,
        seconds=seconds,
        sampling_seconds=watch.seconds["sampling"],
        reward_seconds=watch.seconds["reward"],
        updating_seconds=watch.seconds["updating"],
        peak_bytes=peak_bytes(device),
        parameters=parameters,
        mean_rewards=tuple(watch.mean_rewards),
    )


def sampler_trainer_gap(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], choices: GRPOChoices
) -> LogProbGap:
    """How far TRL's sampler and its trainer are apart on the samples of one step, before any update.

    The samples come from the trainer's own call of `generate`, which is made to keep its scores
    (B, L, V), so take few prompts. Raises UserError as `train_grpo_lora` does.
    """
    with (
        grpo_trainer(adapted, tokenizer, prompts, lambda **_: [], choices, by_generate=True) as trainer,
        _kept_scores(adapted) as kept,
    ):
        adapted.train()  # as in a training step
        rows = [prompt for prompt in prompts[: choices.prompts] for _ in range(choices.group)]
        prompt_ids, *_ = trainer._tokenize_prompts(rows)
        completions, _ = trainer._generate_single_turn(prompt_ids, None, {}, choices.group)
        sampled_BL, trained_BL = _both_log_probs(trainer, kept[0], prompt_ids, choices.micro_batch)
    lengths = torch.tensor([len(completion) for completion in completions], device=sampled_BL.device)
    valid_BL = torch.arange(sampled_BL.shape[1], device=lengths.device) < lengths[:, None]
    gap_T = (sampled_BL.double() - trained_BL.double()).abs()[valid_BL]
    return LogProbGap(float(gap_T.max()), float(gap_T.mean()), len(gap_T))


@torch.no_grad()
def _both_log_probs(
    trainer: Any, output: Any, prompt_ids: Sequence[Sequence[int]], micro_batch: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, L) of the sampled tokens: from the scores of `generate`, and from the trainer."""
    score_BLV, width = torch.stack(output.scores, dim=1), max(len(prompt) for prompt in prompt_ids)
    input_ids, token_BL = output.sequences, output.sequences[:, width:]
    mask = torch.ones_like(input_ids)
    for row, prompt in enumerate(prompt_ids):
        mask[row, : width - len(prompt)] = 0
    sampled_BL = score_BLV.float().log_softmax(-1).gather(-1, token_BL[..., None]).squeeze(-1)
    trained_BL, *_ = trainer._get_per_token_logps_and_entropies(
        trainer.model, input_ids, mask, token_BL.shape[1], batch_size=micro_batch
    )
    return sampled_BL, trained_BL


@contextmanager
def _kept_scores(adapted: Any) -> Iterator[list[Any]]:
    """While open, what `generate` returns also goes to the list, with scores; its caller sees no difference."""
    kept: list[Any] = []
    plain = adapted.generate

    def generate(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        config = copy.deepcopy(generation_config)
        config.output_scores = config.return_dict_in_generate = True
        kept.append(plain(*args, generation_config=config, **kwargs))
        return kept[-1].sequences

    adapted.generate = generate
    try:
        yield kept
    finally:
        del adapted.generate


def _advantages(advantage: Advantage, group: int, rewards: Sequence[float]) -> list[float]:
    """In TRL's order, in which the samples of a prompt follow each other; their mean is 0, so TRL leaves them."""
    found: list[float] = advantage(torch.tensor(rewards, dtype=torch.float64), group)[0].tolist()
    return found


class _Watch(TrainerCallback):
    """Stands where TRL passes by in each step: its begin, the reward function, its end; keeps times and counts."""

    def __init__(
        self,
        reward_function: RewardFunction,
        bar: Meter,
        device: torch.device,
        after_step: Callable[[int], None] | None,
        worth: Callable[[Sequence[float]], list[float]] | None = None,
    ) -> None:
        self.seconds = {"sampling": 0.0, "reward": 0.0, "updating": 0.0}
        self.sampled_tokens = 0
        self.mean_rewards: list[float] = []
        self._reward_function = reward_function
        self._bar = bar
        self._device = device
        self._after_step = after_step
        self._worth = worth
        self._last = 0.0
        self.paused = 0.0

    def now(self) -> float:
        """Seconds; what the device was told before is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Sampling begins."""
        self._last = self.now()

    def reward(
        self, prompts: list[Prompt], completions: list[Any], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """What TRL calls between sampling and updating; a chat's completion comes as a list of one turn."""
        self._book("sampling")
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        lengths = [len(ids) for ids in completion_ids]
        rewards = [float(reward) for reward in self._reward_function(prompts, texts, lengths)]
        self.sampled_tokens += sum(lengths)
        self.mean_rewards.append(sum(rewards) / max(len(rewards), 1))
        self._book("reward")
        return rewards if self._worth is None else self._worth(rewards)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser has made its step."""
        self._book("updating")
        self._bar.advance(1)
        self._bar.note(f"reward {self.mean_rewards[-1]:.3f}")
        if self._after_step is not None:
            self._after_step(len(self.mean_rewards))
            self.paused += self.now() - self._last

    def _book(self, name: str) -> None:
        now = self.now()
        self.seconds[name] += now - self._last
        self._last = now
