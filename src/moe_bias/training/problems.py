"""Reinforcement learning with verifiable rewards: problems, the layer to begin with, judging, measuring, training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moe_bias.adapter.saved import load_adapter
from moe_bias.backbone import Head
from moe_bias.config import LayerConfig, ModelConfig, RewardConfig, RLConfig, TaskConfig
from moe_bias.features.extract import fork_coverage, measure_fork_mass
from moe_bias.frozen import Frozen, frozen
from moe_bias.layer import MoEBiasLayer
from moe_bias.rollout.answers import greedy_answers
from moe_bias.rollout.policy import Policy, base_policy, layer_policy
from moe_bias.rollout.sampler import Rollouts, Sampler, SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.support import choose_support
from moe_bias.tasks.catalogue import make_task
from moe_bias.tasks.conversations import answer_ends, ask, encode_prompt
from moe_bias.tasks.mathematics import Columns, data_task
from moe_bias.tasks.rewards import RewardRules, Rewards
from moe_bias.tasks.task import Problem, Task
from moe_bias.tasks.verdict import Verdict
from moe_bias.training.advantage import Advantage, LengthAdvantages, group_advantages
from moe_bias.training.collect import Collector, Curriculum, Judge, Judged
from moe_bias.training.sft import fresh_layer, parse_support, start

CALIBRATION_PROMPTS = 64
CALIBRATION_GROUP = 4
"""The support of a fresh layer is chosen on so many of the frozen model's own samples."""


@dataclass(frozen=True)
class TaskData:
    """A task's problems for a frozen model: those to train on, and others to measure on.

    `answering` answers in its place where it is given: the same model under LoRA, whose output embedding is the same.
    """

    base: Frozen
    task: Task
    train: Curriculum
    test: Curriculum
    stop_ids: list[int]
    answering: Any = None

    @property
    def model(self) -> Any:
        """What answers."""
        return self.base.model if self.answering is None else self.answering

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.base.tokenizer

    @property
    def head(self) -> Head:
        """Its output embedding."""
        return self.base.head


def task_of(settings: TaskConfig) -> Task:
    """The task that the settings name. Raises UserError where there is none."""
    if settings.problems:
        columns = Columns(settings.question_column, settings.gold_column)
        return data_task(settings.problems, settings.split, columns)
    return make_task(settings.task, settings.task_options, settings.easy)


def prepare_task(model: ModelConfig, settings: TaskConfig, seed: int) -> TaskData:
    """Draws the problems, then loads the model. Raises UserError where there are too few, or none can be had."""
    task = task_of(settings)
    problems = task.problems(settings.train_problems + settings.test_problems, seed)
    return task_data(frozen(model), task, problems, settings.train_problems)


def task_data(base: Frozen, task: Task, problems: Sequence[Problem], cut: int) -> TaskData:
    """The problems as prompts, the first `cut` of them to train on."""
    prompts = [encode_prompt(ask(problem.question), base.tokenizer) for problem in problems]
    return TaskData(
        base,
        task,
        Curriculum(list(problems[:cut]), prompts[:cut]),
        Curriculum(list(problems[cut:]), prompts[cut:]),
        answer_ends(base.model, base.tokenizer),
    )


def sampling_choices(settings: RLConfig, data: TaskData) -> SamplingChoices:
    """How a step samples."""
    return SamplingChoices(
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        group=settings.group,
        batch_size=settings.batch_size,
        stop_ids=data.stop_ids,
        top_p=settings.top_p,
        first_token_only=settings.first_token_only,
    )


def sampler_of(settings: RLConfig, data: TaskData) -> TransformersSampler:
    """The sampler on the frozen model."""
    return TransformersSampler(data.model, data.head, int(settings.sample_budget))


def rewards_of(settings: RewardConfig, own: Any = None) -> Rewards:
    """Shaped rewards by the settings, `own` in place of their `reward`. Raises UserError where one cannot be used."""
    return Rewards(
        RewardRules(
            settings.verdict_weight,
            settings.form,
            settings.form_weight,
            settings.reward if own is None else own,
            settings.reward_weight,
            settings.overlong_cache,
            settings.length_penalty,
            settings.token_budget,
        )
    )


def judge_of(data: TaskData, rewards: Rewards, limit: int) -> Judge:
    """Decodes samples, has the task verify them, and rewards them.

    Raises UserError where the rewards cannot be of answers of at most `limit` tokens.
    """
    rewards.check_limit(limit)

    def judge(problems: Sequence[Problem], rollouts: Rollouts) -> list[Judged]:
        texts = [data.tokenizer.decode(answer.token_ids) for answer in rollouts.answers]
        verdicts = data.task.verify(problems, texts)
        lengths = [len(answer.all_ids) for answer in rollouts.answers]
        shaped = rewards.shaped(problems, texts, verdicts, lengths, limit)
        rows = zip(problems, texts, lengths, rollouts.answers, verdicts, shaped, strict=True)
        return [Judged(p, text, n, answer.finished, verdict, r) for p, text, n, answer, verdict, r in rows]

    return judge


def collector_of(
    data: TaskData,
    rewards: Rewards,
    settings: RLConfig,
    sampler: Sampler | None = None,
    margin: float | None = None,
) -> Collector:
    """What collects the samples of each step, by the frozen model itself where no other sampler is given."""
    judge, choices = judge_of(data, rewards, settings.max_new_tokens), sampling_choices(settings, data)
    return Collector(
        sampler or sampler_of(settings, data), data.train, judge, settings, choices, margin, advantage_of(rewards)
    )


def advantage_of(rewards: Rewards) -> Advantage:
    """What a sample of these rewards is worth among those of its prompt, where nobody says otherwise."""
    return LengthAdvantages(rewards.rules.earned_share) if rewards.rules.length_penalty else group_advantages


def policy_of(layer: MoEBiasLayer | None, head: Head) -> Policy:
    """The policy of a layer, or of the frozen model for None."""
    return base_policy if layer is None else layer_policy(layer, head.transform)


@dataclass(frozen=True)
class GradedAnswer:
    """The verdict on an answer, and its token ids, end token included."""

    verdict: Verdict
    token_ids: list[int]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.token_ids)


def graded_answers(
    data: TaskData, curriculum: Curriculum, policies: Sequence[Policy], settings: RLConfig, description: str
) -> list[list[GradedAnswer]]:
    """Greedy answers with their verdicts, by policy, then by problem."""
    later, size = [base_policy] * len(policies) if settings.first_token_only else None, settings.batch_size
    return greedy_graded(data, curriculum, policies, settings.max_new_tokens, size, description, later)


def greedy_graded(
    data: TaskData,
    curriculum: Curriculum,
    policies: Sequence[Policy],
    limit: int,
    batch_size: int,
    description: str,
    later: Sequence[Policy] | None = None,
) -> list[list[GradedAnswer]]:
    """Those of at most `limit` tokens, from the second on by the `later` policies."""
    answers = greedy_answers(
        data.model,
        data.head,
        curriculum.prompts,
        policies,
        stop_ids=data.stop_ids,
        max_new_tokens=limit,
        batch_size=batch_size,
        later_policies=later,
        description=description,
    )
    texts = [[data.tokenizer.decode(answer.token_ids) for answer in column] for column in answers]
    graded = [data.task.verify(curriculum.problems, column) for column in texts]
    return [
        [GradedAnswer(verdict, answer.all_ids) for verdict, answer in zip(*columns, strict=True)]
        for columns in zip(graded, answers, strict=True)
    ]


@dataclass(frozen=True)
class Beginning:
    """The layer that training starts from, and the share of held-out fork mass that its support holds."""

    layer: MoEBiasLayer
    fork_coverage: float | None


def saved_layer(name: str, head: Head) -> Beginning:
    """The layer of an adapter folder or Hub id. Raises UserError where it does not fit the model."""
    layer, config = load_adapter(name, head)
    return Beginning(layer, config.fork_coverage)


@torch.no_grad()
def fresh_policy_layer(data: TaskData, settings: RLConfig) -> Beginning:
    """A layer that changes nothing yet, its support and normalisation from the frozen model's own samples.

    The support is chosen on half of the samples' problems, and its coverage measured on the other half.
    """
    head = data.head
    support = parse_support(settings.support, head.vocab_size)
    config = LayerConfig(num_experts=1, top_k=1, experts="free", entropy_gate=False, support=(0,))
    still = head.layer(config).to(head.device)
    prompts = data.train.prompts[:CALIBRATION_PROMPTS]
    choices = SamplingChoices(
        settings.temperature, settings.max_new_tokens, CALIBRATION_GROUP, settings.batch_size, data.stop_ids
    )
    rollouts = sampler_of(settings, data).sample(prompts, still, choices, settings.seed, "samples of the frozen model")
    features = rollouts.features
    first_half_T = features.example < len(rollouts.answers) // 2
    if isinstance(support, int):
        mass_V = measure_fork_mass(head, features.hidden[first_half_T]).mass
        support = choose_support(mass_V, support, data.stop_ids)
    covered = fork_coverage(measure_fork_mass(head, features.hidden[~first_half_T]), support)
    whole = len(support) == head.vocab_size
    layer = fresh_layer(settings, None if whole else tuple(support), head)
    start(layer, features, settings)
    return Beginning(layer.to(head.device), covered)
