"""Samplers on engines of their own, and what transformers computes on the tokens that they sampled."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import randomise
from helpers.served import HIDDEN, VOCABULARY, read_at_scale, running, write_model
from moe_bias.backbone import find_head
from moe_bias.config import LayerConfig
from moe_bias.features.extract import run_backbone, with_scalars
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.rollout.engines import LocalEngine
from moe_bias.rollout.policy import layer_policy
from moe_bias.rollout.sampler import Rollouts, SamplingChoices
from moe_bias.rollout.vllm import VllmSampler
from moe_bias.serving.recording import RowLayout, Spool
from moe_bias.support import log_prob_from_adapted
from moe_bias.tasks.conversations import Example

STOPS = [5, 6, 7]
CHOICES = SamplingChoices(temperature=1.0, max_new_tokens=12, group=3, batch_size=4, stop_ids=STOPS)
REWARD = """
def early_letters(prompt, completion, gold):
    return sum(c in "abcdefghijklm" for c in completion) / max(len(completion), 1)
"""
_RL = (
    "train rl --model model --problems problems.jsonl --gold-column gold --train-problems 24 --test-problems 4"
    " --support all --device cpu --prompts 8 --group 4 --max-new-tokens 12 --batch-tokens 64 --num-experts 3"
    " --experts free --verdict-weight 0 --reward rewards:early_letters --reward-weight 1 --engine-memory 16MiB"
)
RL_WORDS = _RL.split()
CLOSE = {"rtol": 0, "atol": 1e-4}


def layer_of(
    support: tuple[int, ...] | None = tuple(range(2, 60)), seed: int = 1, rows: Any = None, **kind: Any
) -> MoEBiasLayer:
    """`rows` are those of the model's output embedding, where experts of the kind are made through it."""
    config = LayerConfig(**{"experts": "free", "num_experts": 4, **kind}, support=support)
    layer = MoEBiasLayer(config, HIDDEN, VOCABULARY, rows)
    randomise(layer, seed=seed)
    read_at_scale(layer)
    return layer


class WithoutSeeds(LocalEngine):
    """On a CPU vLLM 0.32 cannot cut the prompt of a request that has a seed."""

    def answers(self, requests: Any, choices: Any) -> Iterator[Any]:
        return super().answers([replace(request, seed=None) for request in requests], choices)


@contextmanager
def sampling(
    served: tuple[Path, Path], model: Any, folder: Path, kind: type[LocalEngine] = LocalEngine, **choices: Any
) -> Iterator[tuple[VllmSampler, Any]]:
    """A sampler on an engine of its own, and that engine."""
    choices = {"logprobs_mode": "processed_logprobs", "enable_chunked_prefill": kind is WithoutSeeds, **choices}
    adapters, spool = folder / "adapters", folder / "spool"
    adapters.mkdir()
    spool.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_BIAS_SPOOL", str(spool))
        with running(served[0], adapters, **choices) as engine:
            head = find_head(model)[1]
            layout = RowLayout.of_model(head.hidden_size, head.dtype)
            yield VllmSampler(kind(engine), model, head, adapters, Spool(spool, layout)), engine


def completions(rollouts: Rollouts) -> list[list[int]]:
    """Each sample's tokens, the end token included."""
    rows = rollouts.features.token.split(rollouts.features.example.bincount(minlength=len(rollouts.answers)).tolist())
    return [row.tolist() for row in rows]


def check_against_transformers(model: Any, layer: MoEBiasLayer, asked: list[list[int]], rollouts: Rollouts) -> None:
    """Features by teacher-forced extraction, log-probabilities by a whole softmax and by the trainer's reduced one."""
    head, features, temperature = find_head(model)[1], rollouts.features, rollouts.temperature
    answers = completions(rollouts)
    examples = [Example(asked[i // rollouts.group], answer) for i, answer in enumerate(answers)]
    hidden = run_backbone(model, examples, 4, "test")
    warm = replace(head, transform=replace(head.transform, scale=head.transform.scale / temperature))
    expected = with_scalars(warm, hidden, features.support.tolist(), "test")
    for name in ("hidden", "token", "example", "position", "logit", "log_partition", "column"):
        torch.testing.assert_close(getattr(features, name), getattr(expected, name), **CLOSE)
    torch.testing.assert_close(features.rest.log_sum_exp, expected.rest.log_sum_exp, **CLOSE)
    torch.testing.assert_close(features.rest.mean_logit, expected.rest.mean_logit, **CLOSE)
    with torch.no_grad():
        logits_TV = head.logits(hidden.hidden)
        torch.testing.assert_close(features.entropy, entropy_from_logits(logits_TV), **CLOSE)
        policy_TV = layer_policy(layer, head.transform)(hidden.hidden, logits_TV) / temperature
        log_prob_T = policy_TV.log_softmax(-1).gather(-1, features.token[:, None]).squeeze(-1)
        torch.testing.assert_close(rollouts.log_prob, log_prob_T, **CLOSE)
        torch.testing.assert_close(rollouts.policy_entropy, entropy_from_logits(policy_TV), **CLOSE)
        logits_TM = head.columns(features.support)(features.hidden)
        move_TM = layer.strength * layer(features.hidden, features.entropy).bias
        reduced_T = log_prob_from_adapted(
            features.logit, features.column, (logits_TM + move_TM) / temperature, features.rest
        )
    torch.testing.assert_close(rollouts.log_prob, reduced_T, **CLOSE)


def write_ground(folder: Path) -> Path:
    """A model, problems and a reward, for `train rl` in this folder."""
    write_model(folder / "model")
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [{"problem": f"What comes after {n}, and after that? Answer in words.", "gold": str(n)} for n in range(28)]
    (folder / "problems.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return folder
