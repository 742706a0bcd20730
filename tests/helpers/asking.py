"""Asking an engine, and what transformers answers."""

import random
from typing import Any

import torch
from vllm import SamplingParams

from helpers.served import ADAPTERS, VOCABULARY

NAMES = (None, *ADAPTERS)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, VOCABULARY) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def greedy(name: str | None, tokens: int = 12, **choices: Any) -> SamplingParams:
    extra = {} if name is None else {"extra_args": {"moe_bias": name}}
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **extra, **choices)


def ask(engine: Any, asked: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    inputs = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    answers = engine.generate(inputs, [params for _, params in asked], use_tqdm=False)
    return [answer.outputs[0] for answer in answers]


def metric(engine: Any, name: str) -> int:
    return sum(found.value for found in engine.get_metrics() if found.name == name)


@torch.no_grad()
def reference_log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities (tokens of the answer, V) of transformers on the whole sequence."""
    logits = model(input_ids=torch.tensor([prompt + list(answer)])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def summed_log_probs(reference: Any, strengths: dict[str, float], prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The same under several adapters: the plain model's logits and, times its strength, what each adapter adds."""
    ids = torch.tensor([prompt + list(answer)])
    base = reference(None)(input_ids=ids).logits[0].double()
    total = base.clone()
    for name, strength in strengths.items():
        moved = reference(name)(input_ids=ids).logits[0].double()
        total += strength / ADAPTERS[name].strength * (moved - base)
    return total[len(prompt) - 1 : -1].log_softmax(-1)


def check_against_transformers(engine: Any, reference: Any, count: int = 32, tokens: int = 12) -> None:
    """Mixed requests with every logit returned: tokens are the reference's arg-max, log-probs are close.

    Those of rare tokens are further below 0, and float32 rounds them in proportion.
    """
    asked = [(prompt, NAMES[place % len(NAMES)]) for place, prompt in enumerate(prompts(count))]
    answers = ask(engine, [(prompt, greedy(name, tokens, logprobs=-1)) for prompt, name in asked])
    for (prompt, name), answer in zip(asked, answers, strict=True):
        expected = reference_log_probs(reference(name), prompt, answer.token_ids)
        assert list(answer.token_ids) == expected.argmax(-1).tolist()
        found = torch.tensor([[step[token].logprob for token in range(VOCABULARY)] for step in answer.logprobs])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
