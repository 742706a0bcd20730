"""The trainer of reinforcement learning on a tiny random model, its rewards made up."""

import torch

from helpers.models import VOCABULARY, tiny_model
from moe_bias.backbone import find_head
from moe_bias.config import RLConfig
from moe_bias.rollout.sampler import SamplingChoices
from moe_bias.rollout.sampling import TransformersSampler
from moe_bias.tasks.task import Problem
from moe_bias.tasks.verdict import judged
from moe_bias.training.checkpoint import Checkpoints
from moe_bias.training.collect import Collector, Curriculum, Judged
from moe_bias.training.loop import Watching
from moe_bias.training.rl import PolicyTrainer

WANTED = set(range(3, 40))
SUPPORT = tuple(range(0, VOCABULARY, 2))
PROMPTS = [[5, 7, 9 + number] for number in range(10)]
PROBLEMS = [Problem(f"question {number}", "gold", "", {}) for number in range(10)]


def settings_of(**changes) -> RLConfig:
    usual = {"steps": 4, "prompts": 4, "group": 4, "max_new_tokens": 5, "epochs": 2, "batch_tokens": 8, "rho": 0.5}
    return RLConfig(**{**usual, "experts": "free", "num_experts": 4, "expert_rate": 3.0, **changes})


def share_of_wanted(tokens) -> float:
    return sum(token in WANTED for token in tokens) / max(len(tokens), 1)


class Setting:
    """A trainer with all that belongs to it, and what was judged."""

    def __init__(
        self,
        settings,
        reward=share_of_wanted,
        folder=None,
        keep=2,
        layer=None,
        objective=None,
        callbacks=(),
        changed=lambda collector: collector,
    ):
        model = tiny_model()
        head = find_head(model)[1]
        torch.manual_seed(0)
        config = settings.layer_config(SUPPORT)
        self.layer = layer or head.layer(config)
        self.rounds = []
        self.accuracies = 0

        def judge(problems, rollouts):
            self.rounds.append([problem.question for problem in problems])
            rewards = [reward(answer.token_ids) for answer in rollouts.answers]
            return [
                Judged(problem, str(answer.token_ids), len(answer.token_ids), answer.finished, judged(r > 0.5, None), r)
                for problem, answer, r in zip(problems, rollouts.answers, rewards, strict=True)
            ]

        def evaluate(layer):
            self.accuracies += 1
            return 0.25

        choices = SamplingChoices(settings.temperature, settings.max_new_tokens, settings.group, 8, [2])
        sampler = TransformersSampler(model, head)
        self.collector = changed(Collector(sampler, Curriculum(PROBLEMS, PROMPTS), judge, settings, choices))
        self.checkpoints = None if folder is None else Checkpoints(folder, 1, keep)
        self.lines = []
        watching = Watching(evaluate, 2, self.checkpoints, self, callbacks=callbacks)
        self.trainer = PolicyTrainer(self.layer, head, self.collector, settings, watching, objective)

    def write(self, step, metrics):
        self.lines.append({"step": step, **metrics})
